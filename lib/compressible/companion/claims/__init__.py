from compressible.companion.claims.intervals import interval
from compressible.companion.claims.report import table
from compressible.companion.claims.rules import FAIL, INCONCLUSIVE, PASS, WEAK, Verdict, judge, verdict
from compressible.companion.claims.standing import OWN, Standing, check_preset, standings
from compressible.companion.claims.statement import NOT_TESTED, Claim, ClaimError, load_claims, published
from compressible.companion.claims.writing import write, written

__all__ = [
    "FAIL",
    "INCONCLUSIVE",
    "NOT_TESTED",
    "OWN",
    "PASS",
    "WEAK",
    "Claim",
    "ClaimError",
    "Standing",
    "Verdict",
    "check_preset",
    "interval",
    "judge",
    "load_claims",
    "published",
    "standings",
    "table",
    "verdict",
    "write",
    "written",
]
