"""Hold a whole stored checkpoint against what it says of itself, and name every fault.

With a seal every byte is covered: each file's size and digest, and each tensor's. What another program wrote has no digests: there names,
sizes, headers and what metadata promises are checked, and the result says that this is all.
"""

from reshard.verification.checkpoint import verify, verify_all
from reshard.verification.faults import Fault, RootVerification, Verification

__all__ = ["Fault", "RootVerification", "Verification", "verify", "verify_all"]
