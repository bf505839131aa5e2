"""Who refused, which a status alone does not tell. Pure."""

from __future__ import annotations

# In the words of a webhook, and of a ValidatingAdmissionPolicy.
_DENIED = ("denied the request", "denied request")


def denied(words: str) -> bool:
    """Whether a policy or a webhook refused: they may do so with whatever status and reason they like, see
    https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#response
    """
    lower = words.lower()
    return any(sign in lower for sign in _DENIED)
