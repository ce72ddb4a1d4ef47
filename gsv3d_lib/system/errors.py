"""What a user can mend, told apart from what is a bug of ours.

The library's own checks of files, pictures, settings and options raise `UserError`: one
sentence that says what came and what to do. Commands print that sentence and nothing
else. Whatever else goes wrong keeps its traceback, and so do the checks of tensor
shapes between our own functions, which are plain ValueErrors: a command that trips over
one has a bug.
"""

from __future__ import annotations

import errno
import re


class UserError(ValueError):
    """Something that the user can mend; its text is the sentence that says how."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named and that is not there."""


class Doubt(UserWarning):
    """What was taken for the user's object or picture, in one sentence, where it might
    be something else.
    """


# What the machine does to a user, by the number of the OSError; {0} is the file.
MACHINE = {
    errno.ENOSPC: "the disk is full: {0} could not be written. Free some space and give the command again.",
    errno.EDQUOT: "your quota is used up: {0} could not be written. Free some space and give the command again.",
    errno.EFBIG: "{0} is larger than this file system or your limits allow.",
    errno.EACCES: "{0} may not be read or written by you: change its permissions, or name another place.",
    errno.EPERM: "{0} may not be read or written by you: change its permissions, or name another place.",
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


NO_MEMORY = "there is not enough memory for this: ask for less at once (smaller, fewer), or use a larger machine."
# how safetensors and other libraries in Rust tell the number
IN_TEXT = re.compile(r"\bos error (\d+)\b")


def machine_fault(error: Exception) -> str | None:
    """One sentence for what is the machine's doing, None for any other exception (which
    may be a bug of ours).
    """
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return NO_MEMORY  # Python's and numpy's, torch's on a GPU, torch's on a CPU
    number = getattr(error, "errno", None)
    if number is None and (told := IN_TEXT.search(str(error))):
        number = int(told[1])
    sentence = MACHINE.get(number)
    if sentence is None:
        return None
    name = str(getattr(error, "filename", None) or "the file")
    return sentence.format(name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}")
