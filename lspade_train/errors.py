"""Named errors: what was found, what was expected, and the next command."""

# Independent of the rest of the package.


class LSpadeError(Exception):
    """A user's mistake or a broken input; the command line prints it in one or two lines."""


class RecipeError(LSpadeError):
    """A recipe that cannot be used: missing file, unknown key, value out of range."""


class UnsupportedModelError(LSpadeError):
    """The model cannot be run block by block, or could not be loaded."""


class TaskError(LSpadeError):
    """A task or dataset that cannot be turned into prompts with one-token answers."""


class CacheError(LSpadeError):
    """A cache that is missing, damaged, or was built for something else."""


class ArtifactError(LSpadeError):
    """A heads folder that is missing, damaged, or belongs to another model."""


class HubError(ArtifactError):
    """A repository on the Hub that cannot be reached, read or written."""


class PolicyError(LSpadeError):
    """An exit policy that is malformed or belongs to other heads."""


class AuditError(LSpadeError):
    """An audit's state that is damaged or belongs to another policy, or settings out of range."""


class NumericsError(LSpadeError):
    """NaN or Inf where finite numbers are needed."""


class UnsupportedVersionError(LSpadeError):
    """A package that is missing, or installed in a version outside the supported range."""


class StoppedError(LSpadeError):
    """Another process of the same run exited unexpectedly."""


class PeerError(LSpadeError):
    """Another process failed; its error is reported by rank 0."""
