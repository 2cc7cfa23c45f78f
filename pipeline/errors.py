"""Every error that latentmill raises on purpose.

    LatentmillError
    ├── UserError                   exit 1: the user can correct it; one line says what, where and how
    │   ├── ConfigError             an unknown key, a wrong type, a contradiction between fields
    │   │   ├── Unset               a value of the environment that is not there
    │   │   └── OverrideError       exit 2: an argument that cannot be parsed
    │   ├── SourceError             nothing at the source pattern, or too much of it rejected
    │   ├── DatasetError            no manifest, or one that this program cannot read
    │   │   └── ContractMismatch    a cache made by other encoders, or of another shape, than this run needs
    │   ├── DestinationExists       the destination holds something that would be overwritten
    │   ├── RunError                no run there, no checkpoint in it, or one that belongs to another configuration
    │   │   ├── RunFinished         a run that has seen all of its samples
    │   │   └── RunTaken            a run that another process trains, or a job in the queue will
    │   ├── SubmitError             no Slurm on this machine, or it refused the job
    │   ├── ShapeError              tensors whose sizes the model cannot take
    │   └── WeightsError            a weights file that is missing, damaged or of another architecture
    ├── DataError                   exit 1: data that are not what they should be
    │   ├── ParseError              bytes that are not what their format says (also a ValueError)
    │   ├── ShardCorrupt            a tar that is cut or damaged, or whose hash is not the manifest's
    │   ├── RecordRejected          one sample that cannot be used, with the reason; counted, never fatal by itself
    │   ├── NonFinite               NaN or infinity in a latent, a loss or a gradient, with the samples named
    │   ├── LossSpike               a loss or a gradient that jumps, where guard.action says to stop, with the samples
    │   ├── CheckpointCorrupt       a committed checkpoint whose bytes do not match its hashes
    │   └── NotProved               a ledger that does not prove that each sample was trained on once
    ├── StorageError                exit 1: reading or writing failed, also after retries
    │   └── NotFound                there is no such object
    └── Interrupted                 exit 75: stopped by a signal after a commit; the same command continues

Messages say what happened, where (path, shard, key, rank) and what to do next. `assert` is for programmers' mistakes.
"""


class LatentmillError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the process's exit status when it ends a verb."""

    exit_code = 1


class UserError(LatentmillError):
    """A mistake that the user can correct; the message says how."""


class ConfigError(UserError):
    """A configuration with an unknown key, a wrong value or a contradiction."""


class Unset(ConfigError):
    """A value that a stored configuration takes from the environment, and that the environment here does not give."""


class OverrideError(ConfigError):
    """A command-line argument that cannot be parsed."""

    exit_code = 2


class SourceError(UserError):
    """Nothing at the source pattern, or too much of it rejected."""


class DatasetError(UserError):
    """No dataset at a path or URL, or one that this program cannot read."""


class ContractMismatch(DatasetError):
    """The cache's contract differs from what the run needs."""


class DestinationExists(UserError):
    """The destination already holds something else."""


class RunError(UserError):
    """No run at a path or URL, no checkpoint in it, or one of another configuration."""


class RunFinished(RunError):
    """The run has seen all of its samples."""


class RunTaken(RunError):
    """Another process trains the run, or a job in the queue will."""


class SubmitError(UserError):
    """Slurm is not available on this machine, or it refused the job."""


class ShapeError(UserError):
    """Tensor sizes that the model cannot take."""


class WeightsError(UserError):
    """A weights file that is missing, damaged or of another architecture."""


class DataError(LatentmillError):
    """Data that are not what they should be."""


class ParseError(DataError, ValueError):
    """Bytes that are not what their format says. The message begins with "it"; who reads a file names it and says what
    to do."""


class ShardCorrupt(DataError):
    """A tar that is cut or damaged, or whose hash is not the manifest's."""


class RecordRejected(DataError):
    """One source sample that cannot be used.

    reason: the word under which the manifest counts such rejects (for example "image_truncated").
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class NonFinite(DataError):
    """NaN or infinity in a latent, a loss or a gradient."""


class LossSpike(DataError):
    """A loss or a gradient that jumps, where the configuration says that the run ends then."""


class CheckpointCorrupt(DataError):
    """A committed checkpoint whose bytes do not match its hashes."""


class NotProved(DataError):
    """A run's ledger does not prove that each sample was trained on once."""


class StorageError(LatentmillError):
    """Reading or writing failed, also after retries."""


class NotFound(StorageError):
    """There is no such object."""


class Interrupted(LatentmillError):
    """Stopped by a signal with everything committed; the same command continues from there."""

    exit_code = 75
