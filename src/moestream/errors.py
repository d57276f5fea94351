"""Every error moestream raises on purpose.

MoestreamError
├── ConfigError           a flag, environment variable or argument is wrong (names it)
├── CheckpointError       a model folder cannot be used as it is (names the file, tensor or field)
│   ├── HeaderError       a safetensors header is malformed
│   ├── ShardIndexError       model.safetensors.index.json is malformed or points outside the folder
│   ├── TensorError       a tensor is missing, or its dtype, shape or extent is wrong
│   └── ModelConfigError  config.json misses a field or holds a value we do not run
├── BudgetError           the memory budget cannot hold what must be resident (says what is needed)
├── ReadError             the disk failed or returned fewer bytes than asked (names file, offset, errno)
├── BackendError          a backend is not installed or cannot run here (gives the install line)
├── TemplateError         a chat template failed, or ran past its time, memory or output limit
├── RequestError          one request is invalid or failed; other requests go on
└── NonFiniteLogitsError  a request's logits hold NaN or Inf
"""

from __future__ import annotations


class MoestreamError(Exception):
    """Base of every deliberate error."""


class ConfigError(MoestreamError):
    """A flag, environment variable or argument is wrong."""


class CheckpointError(MoestreamError):
    """A model folder cannot be used as it is."""


class HeaderError(CheckpointError):
    """A safetensors header is malformed."""


class ShardIndexError(CheckpointError):
    """``model.safetensors.index.json`` is malformed or points outside the folder."""


class TensorError(CheckpointError):
    """A tensor is missing, or its dtype, shape or extent is wrong."""


class ModelConfigError(CheckpointError):
    """``config.json`` misses a field or holds a value we do not run."""


class BudgetError(MoestreamError):
    """The memory budget cannot hold what must be resident."""


class ReadError(MoestreamError):
    """The disk failed or returned fewer bytes than asked."""


class BackendError(MoestreamError):
    """A backend is not installed or cannot run here."""


class TemplateError(MoestreamError):
    """A chat template failed or ran past one of its limits."""


class RequestError(MoestreamError):
    """One request is invalid or failed; other requests go on."""


class NonFiniteLogitsError(RequestError):
    """A request's logits hold NaN or Inf."""
