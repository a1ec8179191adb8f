"""A static site of the records, the claims, the executed notebooks and the docstrings, which needs no network."""

from compressible.companion.site.build import SiteError, build

__all__ = ["SiteError", "build"]
