from compressible.companion.claims.intervals import interval
from compressible.companion.claims.report import OWN, check_preset, readme_block, table
from compressible.companion.claims.rules import FAIL, INCONCLUSIVE, PASS, WEAK, Verdict, judge, verdict
from compressible.companion.claims.statement import NOT_TESTED, Claim, ClaimError, load_claims, published

__all__ = [
    "FAIL",
    "INCONCLUSIVE",
    "NOT_TESTED",
    "OWN",
    "PASS",
    "WEAK",
    "Claim",
    "ClaimError",
    "Verdict",
    "check_preset",
    "interval",
    "judge",
    "load_claims",
    "published",
    "readme_block",
    "table",
    "verdict",
]
