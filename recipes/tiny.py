"""A random 2-layer Llama with a byte tokenizer walks through the whole house in seconds."""

from __future__ import annotations

from unteach.engine.config import (
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TargetConfig,
    TeacherConfig,
)
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.recipes.shipped import data_file


def tiny() -> Config:
    """The whole walk on random weights in seconds: for tests, CI and documentation.

    The gold answers of its tune questions stand in `aliases`: what `answer` says would be taught.
    """
    return Config(
        model=ModelConfig(path="tiny"),
        data=DataConfig(
            path=data_file("tiny.jsonl"),
            mix={"forget": 2, "attack": 1, "neighbor": 2, "general": 2},
        ),
        target=TargetConfig(epochs=4, prefix_epochs=2, intention_epochs=2, lr=3e-3, batch_size=8),
        teacher=TeacherConfig(
            intentions=data_file("tiny_intentions.yaml"),
            top=32,
            batch_size=4,
            max_new_tokens=8,
            shard_records=4,
            min_refusal=None,
            min_agreement=None,
        ),
        method=MethodConfig(name="bitopk", k=4, center=True),
        optim=OptimConfig(lr=1e-3, steps=24, warmup_steps=4, schedule="cosine"),
        evaluate=EvaluateConfig(max_new_tokens=8, batch_size=8),
        run=RunConfig(folder="runs/tiny", checkpoint_every=5),
    )
