from compressible.companion.claims.rules import FAIL, PASS, WEAK, Verdict, interval, judge, verdict
from compressible.companion.claims.statement import NOT_TESTED, Claim, ClaimError, load_claims, published
from compressible.companion.claims.table import main, readme_block, table

__all__ = [
    "FAIL",
    "NOT_TESTED",
    "PASS",
    "WEAK",
    "Claim",
    "ClaimError",
    "Verdict",
    "interval",
    "judge",
    "load_claims",
    "main",
    "published",
    "readme_block",
    "table",
    "verdict",
]
