"""From settings to a trained run.

`flags`, with `optimization_flags`, `tuning_flags` and a `config_file`, become `settings`, resolved
once; `job` is what they describe, with the EMA, `initial` its first weights; `resume` goes on with
a run. `loop` makes the steps for a trainer, of `ddp` or `zero_trainer`: `parameters` in groups,
moved by `optimization` and `muon`, beside them `repa`. `reporter` shows them by `trackers`, with
the work and time of `throughput`; `quality` judges samples on the way. `zero` and `zero_config` are
DeepSpeed's engine, `expert_parallel` spreads experts over ranks, `shares` are the checkpoints of
either, `memory` is the bytes of a rank. Knows every floor; the trainers stand on it.
"""
