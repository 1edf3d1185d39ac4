"""Pickles of others, read without running what they name.

A pickle is a program: it names functions of any module and calls them. The checkpoints of
Megatron-LM and NeMo have theirs in `common.pt`, `.metadata` and `model_optim_rng.pt`. Here a name
is looked up in a short list and nowhere else. Classes of Megatron and its kin (enums among the
arguments, states of machines that go on with a run) become plain values, without being imported.
Any other name is refused, and said.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import io
import pickle
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tanren.config.errors import RequestError

# Whose classes become plain values. Nothing of them is imported, so none of their code runs.
# megatron-core 0.11 and later keep the plans of a save, of torch's planner, in `.metadata`.
_FOREIGN = (
    "apex", "lightning", "megatron", "nemo", "pytorch_lightning",
    "torch.distributed.checkpoint.planner", "transformer_engine",
)  # fmt: skip
# Protocol 2, which torch.save takes, writes modules under the names that Python 2 had.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_AGAIN = "bring the checkpoint again, whole"
_ZIP = b"PK\x03\x04"


class Foreign:
    """An object of a class that was not imported: what it was called, and what came with it."""

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """The items of a subclass of dict; they are let go."""

    def append(self, item: Any) -> None:
        """The items of a subclass of list; they are let go."""


class _Sealed(type):
    """What a pickle is given in place of a function or a class: to call, and not to change.

    Its BUILD could otherwise set attributes of the class itself, for the whole process.
    """

    _call: Callable[..., Any]
    # Of an enum, which is known by its members' names as well.
    members: dict[str, enum.Enum]

    def __call__(cls, *arguments: Any) -> Any:
        return cls._call(*arguments)

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of {cls.__name__}")


def _sealed(name: str, call: Callable[..., Any], new: Callable[..., Any] | None = None) -> _Sealed:
    """A stand-in that calls `call`; `new` makes an empty object, whose state follows."""

    def make(cls: type, *arguments: Any) -> Any:
        if new is None:
            raise pickle.UnpicklingError(f"it takes {name} for a class")
        return new(*arguments)

    return _Sealed(name, (), {"_call": staticmethod(call), "__new__": make})


def _class(real: type) -> _Sealed:
    found = _sealed(real.__qualname__, real, lambda *rest: real.__new__(real, *rest))
    if issubclass(real, enum.Enum):
        type.__setattr__(found, "members", dict(real.__members__))
    return found


def _foreign(kind: str) -> _Sealed:
    def call(*arguments: Any) -> Any:
        # An enum: its class, called with a value.
        if len(arguments) == 1 and isinstance(arguments[0], (int, str)):
            return arguments[0]
        return Foreign(kind, arguments)

    found = _sealed(kind, call, lambda *rest: Foreign(kind, rest))
    type.__setattr__(found, "foreign", True)
    return found


def _member(owner: Any, name: str) -> Any:
    """getattr, as Python 3.11.0 to 3.11.3 and some others pickle the member of an enum."""
    if isinstance(owner, _Sealed):
        if getattr(owner, "foreign", False):
            return name
        if name in getattr(owner, "members", {}):
            return owner.members[name]
    raise pickle.UnpicklingError("it takes attributes of objects")


def _latin(text: str, encoding: str) -> bytes:
    """_codecs.encode, as older protocols pickle bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes as {encoding}")
    return text.encode("latin1")


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    """copyreg's, as protocols 0 and 1 make objects."""
    return kind.__new__(kind)


def _numpy_scalar(kind: Any, raw: Any) -> Any:
    """A number of numpy's as Python's own."""
    name = kind.arguments[0] if isinstance(kind, Foreign) and kind.arguments else None
    if not (isinstance(name, str) and isinstance(raw, bytes) and name[:1] in "biuf"):
        raise pickle.UnpicklingError(f"it holds a numpy scalar of the kind {name}")
    (value,) = np.frombuffer(raw, np.dtype(name)).tolist()
    return value


def _with_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that carries attributes of its owner's, such as the parallel dimension; dropped."""
    return rebuild(*arguments)


def _listed() -> dict[str, Any]:
    """Every name that is known, with what stands for it."""
    # Arrays are random states, which nobody needs here.
    array = _sealed("numpy.ndarray", lambda *rest: Foreign("numpy.ndarray"))
    arrays: dict[str, Any] = {"numpy.ndarray": array}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        arrays[f"{module}._reconstruct"] = array
        arrays[f"{module}.scalar"] = _sealed("numpy.scalar", _numpy_scalar)
    calls: dict[str, Callable[..., Any]] = {
        "_codecs.encode": _latin,
        "builtins.getattr": _member,
        "collections.defaultdict": lambda *rest: {},
        "copyreg._reconstructor": _reconstructor,
        "pathlib.PosixPath": lambda *parts: str(Path(*parts)),
        "pathlib._local.PosixPath": lambda *parts: str(Path(*parts)),
        "signal.Signals": lambda number: signal.Signals(number).name,
        "torch._tensor._rebuild_from_type_v2": _with_attributes,
        "torch._utils._rebuild_parameter": lambda data, *rest: data,
        "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch.serialization._get_layout": torch.serialization._get_layout,
    }
    classes: dict[str, type] = {
        "_io.BytesIO": io.BytesIO,
        "argparse.Namespace": argparse.Namespace,
        "builtins.bytearray": bytearray,
        "builtins.complex": complex,
        "builtins.dict": dict,
        "builtins.frozenset": frozenset,
        "builtins.list": list,
        "builtins.object": object,
        "builtins.set": set,
        "builtins.slice": slice,
        "collections.Counter": collections.Counter,
        "collections.OrderedDict": collections.OrderedDict,
        "collections.deque": collections.deque,
        "datetime.timedelta": datetime.timedelta,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "types.SimpleNamespace": types.SimpleNamespace,
    }
    for kind in (
        dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, dcp.Metadata, dcp.MetadataIndex,
        dcp.StorageMeta, dcp.TensorProperties, dcp.TensorStorageMetadata,
        dcp._MEM_FORMAT_ENCODING, _StorageInfo,
    ):  # fmt: skip
        classes[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return {
        **arrays,
        # Of any arguments: a type's name is no enum's value.
        "numpy.dtype": _sealed("numpy.dtype", lambda *rest: Foreign("numpy.dtype", rest)),
        "torch.Tensor": _foreign("torch.Tensor"),
        "torch.nn.parameter.Parameter": _foreign("torch.nn.parameter.Parameter"),
        **{name: _sealed(name, call) for name, call in calls.items()},
        **{name: _class(kind) for name, kind in classes.items()},
        **{
            f"torch.{name}": value
            for name, value in vars(torch).items()
            if isinstance(value, torch.dtype)
        },
    }


_LISTED = _listed()


def load(path: Path, *, trust: bool = False, mapped: bool = False) -> Any:
    """What torch.save wrote: plain values and tensors on the CPU.

    Args:
        trust: import and call whatever the file names, as pickle does.
        mapped: leave the tensors in the file until they are read (copy on write).
    Raises:
        RequestError: the file is missing or torn, or it names what is not known; the name is said.
    """
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
    except FileNotFoundError:
        raise RequestError(path, "is missing", _AGAIN) from None
    except OSError as error:
        raise RequestError(path, f"cannot be read: {error.strerror}", _AGAIN) from None
    # An archive of TorchScript would go to another loader.
    if begin != _ZIP or _is_script(path):
        raise RequestError(
            path,
            "is not a file of torch.save",
            "is it torn, or older than torch 1.6? copy it again, or load and save it with torch",
        )
    module = types.ModuleType("tanren.convert.unpickle")
    module.Unpickler = _unpickler(path, trust)  # type: ignore[attr-defined]
    try:
        return torch.load(
            path, map_location="cpu", pickle_module=module, weights_only=False, mmap=mapped
        )
    except RequestError:
        raise
    except Exception as error:  # a pickle with a wrong byte raises anything
        raise _torn(path, error) from error


def load_metadata(path: Path, *, trust: bool = False) -> dcp.Metadata:
    """`.metadata` of torch.distributed.checkpoint: which tensors there are and where they lie.

    Raises:
        RequestError: as `load`.
    """
    try:
        with path.open("rb") as stream:
            found = _unpickler(path, trust)(stream).load()
    except FileNotFoundError:
        raise RequestError(path, "is missing", "is it a torch_dist checkpoint?") from None
    except OSError as error:
        raise RequestError(path, f"cannot be read: {error.strerror}", _AGAIN) from None
    except RequestError:
        raise
    except Exception as error:  # a pickle with a wrong byte raises anything
        raise _torn(path, error) from error
    if isinstance(found, Foreign) and isinstance(found.state, dict):
        # megatron-core 0.15 and later have a class of their own that adds to torch's.
        known = [field.name for field in dataclasses.fields(dcp.Metadata)]
        if "state_dict_metadata" in found.state:
            found = dcp.Metadata(**{key: found.state[key] for key in known if key in found.state})
    if not isinstance(found, dcp.Metadata):
        raise RequestError(path, "holds no metadata of torch.distributed.checkpoint", _AGAIN)
    return found


def _unpickler(path: Path, trust: bool) -> type[pickle.Unpickler]:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{_RENAMED.get(module, module)}.{name}"
            if full in _LISTED:
                return _LISTED[full]
            if any(f"{module}.".startswith(f"{known}.") for known in _FOREIGN):
                return _foreign(full)
            if trust:
                return super().find_class(module, name)
            raise RequestError(
                path,
                f"names {full}, which could run code, and is not among what checkpoints hold",
                "where you know who wrote it: --trust, which runs what the file says",
            )

    return Unpickler


def _is_script(path: Path) -> bool:
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        return "constants.pkl" in reader.get_all_records()
    except RuntimeError as error:
        raise _torn(path, error) from error


def _torn(path: Path, error: Exception) -> RequestError:
    # torch adds the lines of C++ that it came through.
    words = (str(error) or type(error).__name__).splitlines()[0]
    return RequestError(path, f"is not whole: {words}", _AGAIN)
