"""From settings to a trained run.

`flags` become `settings`, resolved once; `job` is what they describe, with the EMA; `resume` goes
on with a run; `loop` makes the steps, `reporter` shows them; `zero` and `zero_config` are
DeepSpeed's engine, `memory` the bytes of a rank. Knows every floor; the trainers stand on it.
"""
