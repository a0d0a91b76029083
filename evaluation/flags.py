"""Values of flags that say what images are judged by; nothing heavy is imported for them."""

import argparse

PREFIX = "timm:"  # of encoders' names
REFERENCES = "results/references"  # default folder of trained classifiers and of statistics


def features_flag(text: str) -> str:
    """Check the name of a network whose features are compared."""
    if text not in ("inception", "classifier") and not text.startswith(PREFIX):
        raise argparse.ArgumentTypeError(f"{text} is not inception, classifier or {PREFIX}NAME")
    return text
