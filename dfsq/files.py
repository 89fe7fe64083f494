"""Files that are there whole or not at all, in folders that can be written to."""

import json
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save


def writable_folder(folder, instead):
    """The folder, made if it is not there; refused before any work if it cannot be written to.

    Parameters
    ----------
    folder : str or Path
    instead : str
        What to do in that case, the end of the message.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OSError
        If no file can be written in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".dfsq-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to {folder}: {reason}; {instead}") from None
    return folder


def write_whole(path, write):
    """Write a file so that a kill or a full disk leaves the old one or the new one, never half.

    Parameters
    ----------
    path : str or Path
        The file; one that is there is replaced once all has been written.
    write : callable
        Called with the path of a temporary file beside it, which it writes. The process is part of
        its name, so that two that write one file never mix; a kill leaves it there, as
        ``NAME.PROCESS.part``, and it can be removed.

    Raises
    ------
    OSError
        If it cannot be written. What stood there before still stands.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises the second
        reason = getattr(error, "strerror", None) or error
        stands = "; what stood there before still stands" if path.is_file() else ""
        raise OSError(f"cannot write {path}: {reason}{stands}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(path, tensors, metadata):
    """Write a safetensors file, the same bytes for the same tensors and metadata.

    Parameters
    ----------
    path : str or Path
        See :func:`write_whole`.
    tensors : dict of str to tensor
    metadata : dict of str to str
        Sorted in the file; the library writes them in an order that changes from run to run.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    content = save(tensors, metadata)  # its save_file makes a file that no other user can read
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content = content[:8] + text.ljust(end - 8) + content[end:]
    write_whole(path, lambda temporary: temporary.write_bytes(content))
