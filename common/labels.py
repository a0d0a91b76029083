"""What a user calls a class: its number or its name."""

from collections.abc import Sequence
from difflib import get_close_matches

from common.errors import UserError

MAX_LISTED = 20  # names in an error message


def label_numbers(texts: Sequence[str], num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Turn the values of `--labels` into class numbers; a name counts before a number.

    Args:
        texts: names, or numbers in [0, num_classes).
        num_classes: of the model.
        class_names: of the checkpoint, empty if it has none.

    Raises:
        UserError: for the first that is neither; it says which name is near.
    """
    labels = []
    for text in texts:
        label = class_names.index(text) if text in class_names else None
        label = int(text) if label is None and text.isdecimal() and len(text) < 10 else label
        if label is None or label >= num_classes:
            names = ", ".join(class_names[:MAX_LISTED])
            names += ", …" if len(class_names) > MAX_LISTED else ""
            near = get_close_matches(text, class_names, n=1)
            raise UserError(
                f"--labels {text}: expected a number in [0, {num_classes - 1}]"
                + (f" or one of {names}" if names else "")
                + (f"; did you mean {near[0]}?" if near else "")
            )
        labels.append(label)
    return labels
