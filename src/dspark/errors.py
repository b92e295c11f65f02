"""One exception tree. Every message says what was expected, what came, and what to do next."""


class DSparkError(Exception):
    """A mistake the user can mend. The command line prints it in one line and exits with 2."""


class InvalidRequest(DSparkError, ValueError):
    """A prompt or a sampling parameter that cannot be served; other requests are untouched."""


class PromptTooLong(InvalidRequest):
    """A prompt that leaves no room for an answer."""


class InvalidConfiguration(DSparkError, ValueError):
    """Options that do not go together, or a name that means nothing."""


class UnsupportedModel(DSparkError):
    """A model that cannot run over the slot cache, found by the check at load time."""


class CheckpointError(DSparkError):
    """A folder that is not the checkpoint it should be: unreadable, incomplete, or for another target."""


class OutOfSlots(DSparkError):
    """The KV cache is full. The engine counts slots before each step, so a user sees this only for a request that can never fit."""


class QueueFull(DSparkError):
    """More requests wait than the operator allows. Nothing is wrong with this one: try again after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: int) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class ShuttingDown(DSparkError):
    """Running requests are being finished and no new one is taken."""


class EngineLost(DSparkError):
    """The engine's process has ended and nobody asked it to."""
