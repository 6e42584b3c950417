"""Being another user for a moment; only root can."""

import os


def as_user(user, groups, action) -> bool:
    """Return whether `action` ends without an OSError when another user does it."""
    own = os.getgroups()
    try:
        os.setgroups(groups)
        os.setegid(groups[0])
        os.seteuid(user)
        action()
    except OSError:
        return False
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own)
    return True
