"""What a refused Pod means for its Task: to wait and say so, to fail and say so, or a fault of this installation. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cloudai.resources import Reason
from cloudai.store.kube.denial import denied

_WAITS = {
    "exceeded quota": Reason.QUOTA_EXCEEDED,
    "failed quota": Reason.QUOTA_EXCEEDED,
    "status unknown for quota": Reason.WAITING_FOR_ADMISSION,
    "being terminated": Reason.WAITING_FOR_ADMISSION,
    "error looking up service account": Reason.WAITING_FOR_ADMISSION,
    "no api token found for service account": Reason.WAITING_FOR_ADMISSION,
    "failed calling webhook": Reason.WAITING_FOR_ADMISSION,
}
_OURS = ("cannot create resource", "cannot get resource")  # what RBAC says: no fault of the task


@dataclass(frozen=True, slots=True)
class Refused:
    """`final`: it would be refused again."""

    reason: Reason
    message: str
    final: bool


def refusal(status: int, words: str) -> Refused | None:
    """The API server's answer to a Pod's creation; None where it says nothing of the Pod itself."""
    lower = words.lower()
    if status == 403 and any(sign in lower for sign in _OURS):
        return None
    for sign, reason in _WAITS.items():
        if sign in lower:
            return Refused(reason, f"The cluster does not admit its Pod yet: {words}", final=False)
    if denied(words) and (status == 429 or status >= 500):
        return Refused(Reason.WAITING_FOR_ADMISSION, f"The cluster does not admit its Pod yet: {words}", final=False)
    if denied(words) or status in (400, 403, 422):
        return Refused(Reason.POD_REFUSED, f"The cluster refuses its Pod: {words}", final=True)
    return None


def taken(pod: str) -> Refused:
    """A Pod of somebody else has the name that the attempt's Pod must have."""
    words = f"Another Pod has the name of its Pod, {pod}; waits until that one is gone."
    return Refused(Reason.WAITING_FOR_ADMISSION, words, final=False)


def untaken(words: str) -> Refused:
    """Nobody knows why the Pod is not made: a webhook that does not answer looks like a server that does not."""
    return Refused(Reason.WAITING_FOR_ADMISSION, f"Its Pod cannot be made: {words}; it is tried again.", final=False)
