"""What a user can mend, told apart from what is a bug of ours.

The library's own checks of files, pictures, settings and options raise `UserError`: one
sentence that says what came and what to do. Commands print that sentence and nothing
else. Whatever else goes wrong keeps its traceback. So do the checks of tensor shapes
between our own functions, which are plain ValueErrors: a command that trips over one
has a bug.
"""

import errno
import re


class UserError(ValueError):
    """Something that the user can mend; its text is the sentence that says how."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named and that is not there."""


class Doubt(UserWarning):
    """What was taken for the object or picture, where it might be something else."""


ROOM = "could not be written. Free some space and give the command again."
RIGHTS = "{0} may not be read or written by you: change its permissions, or name another place."
# What the machine does to a user, by the number of the OSError; {0} is the file.
MACHINE = {
    errno.ENOSPC: f"the disk is full: {{0}} {ROOM}",
    errno.EDQUOT: f"your quota is used up: {{0}} {ROOM}",
    errno.EFBIG: "{0} is larger than this file system or your limits allow.",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EROFS: "{0} lies on a file system that is read-only: name another place.",
    errno.EISDIR: "{0} is a folder where a file belongs: name a file in it, or another place.",
    errno.ENOTDIR: "{0} lies below a file where a folder belongs: name another place.",
    errno.EEXIST: "{0} is a file where a folder belongs: move it, or name another place.",
    errno.ENAMETOOLONG: "the path {0} is too long for this machine: name a shorter one.",
    errno.ELOOP: "{0} is a link that leads back to itself.",
    errno.EMFILE: "too many files are open: raise `ulimit -n`.",
    errno.EIO: "the disk reports an error at {0}.",
    errno.ETXTBSY: "{0} is in use by another program.",
}
NO_MEMORY = (
    "there is not enough memory for this: ask for less at once (smaller, fewer), "
    "or use a larger machine."
)
IN_TEXT = re.compile(r"\bos error (\d+)\b")  # libraries in Rust write the number in their text


def machine_fault(error: Exception) -> str | None:
    """One sentence for what is the machine's doing; None for any other exception."""
    # Python's and numpy's, torch's on a GPU, torch's on a CPU
    names = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if names or "can't allocate memory" in str(error):
        return NO_MEMORY
    number = getattr(error, "errno", None)
    if number is None and (told := IN_TEXT.search(str(error))):
        number = int(told[1])
    if number not in MACHINE:
        return None
    name = str(getattr(error, "filename", None) or "the file")
    return MACHINE[number].format(name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}")
