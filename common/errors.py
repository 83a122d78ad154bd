"""The exception tree. Refusals are values (see `Verdict`); only surprises are exceptions.

    HybridError                    exit code
    ├── UserError                      2      the user can cure it; the message names the cure
    │   ├── SettingsError                     a run file, preset or --set value
    │   ├── DataError                         the training data given by the user
    │   ├── RecordingError                    a recording that is damaged or of another schema
    │   └── CheckpointError                   a checkpoint that does not verify or does not fit
    ├── EnvironmentFault               1      disk, server or machine; retry after mending it
    │   └── BusError
    │       ├── BusUnavailable                no connection, or the server is loading: retry with the same id
    │       ├── BusFull                       the server refuses writes for lack of memory
    │       ├── BusRefused                    wrong password or certificate, or not a Redis server
    │       │   └── NotPermitted       2          the user may not do this: `monitor-node acl`
    │       └── Fenced                        a newer generation writes this stream: stop
    └── CodecError                     1      bytes that are not a message of ours
        ├── SchemaMismatch
        └── BodyTooLarge

Every message is one line. A stack trace means a bug of ours.
"""


class HybridError(Exception):
    """Root of all errors that this project raises on purpose."""

    exit_code = 1


class UserError(HybridError):
    exit_code = 2


class SettingsError(UserError):
    pass


class DataError(UserError):
    pass


class RecordingError(UserError):
    pass


class CheckpointError(UserError):
    pass


class EnvironmentFault(HybridError):
    pass


class BusError(EnvironmentFault):
    pass


class BusUnavailable(BusError):
    pass


class BusFull(BusError):
    pass


class BusRefused(BusError):
    pass


class NotPermitted(BusRefused):
    exit_code = 2


class Fenced(BusError):
    pass


class CodecError(HybridError):
    pass


class SchemaMismatch(CodecError):
    pass


class BodyTooLarge(CodecError):
    pass


# What data of another shape makes its reader raise: JSON, msgpack, tensors of a dtype that a library lacks.
SENSELESS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # RecursionError too; also torch.OutOfMemoryError, which has another cure
    TypeError,
    ValueError,
)
