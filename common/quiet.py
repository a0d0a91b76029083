"""Lines of other libraries at start-up that tell a user nothing, dropped one by one by their words.

Called right before the import that prints the line; all else that the library says is shown.
"""

import logging
import warnings


class _Without(logging.Filter):
    """Lets all records through but those that say certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


def silence(logger: str, words: str) -> None:
    """Drop a logger's records that contain `words`; a second call changes nothing."""
    target = logging.getLogger(logger)
    if not any(isinstance(f, _Without) and f.words == words for f in target.filters):
        target.addFilter(_Without(words))


def silence_torchao() -> None:
    """Before an import of diffusers, which tries torchao where it is installed and needs none.

    torchao itself registers enums in a way that torch calls outdated.
    """
    silence("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor")
    silence("torch.utils._pytree", "register_constant() on Enum subclasses is deprecated")


def silence_accelerator() -> None:
    """Before an import of deepspeed: the log says which device a run has, too."""
    silence("DeepSpeed", "Setting accelerator to CPU")


def silence_worker_count() -> None:
    """Before a DataLoader: workers wait for files most of the time, more than cores are fine."""
    warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes in total")
