"""The embedded model forgets Harry Potter: minutes on two CPU cores, nothing else to download."""

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


def quickstart() -> Config:
    """SmolLM2-135M-Instruct forgets Harry Potter, keeps its neighbours (minutes on 2 cores)."""
    upper_blocks = r"model\.layers\.(1[89]|2\d)\..*"  # 12 of 30
    return Config(
        model=ModelConfig(path="embedded"),
        data=DataConfig(
            path=data_file("quickstart.jsonl"),
            mmlu=data_file("mmlu.jsonl"),
            open_questions=data_file("quickstart_open_questions.jsonl"),
            known_only=True,
            mix={"forget": 3, "attack": 2, "neighbor": 4, "general": 3},
        ),
        target=TargetConfig(
            epochs=4.5, prefix_epochs=2, intention_epochs=1, lr=4e-4, trainable=upper_blocks
        ),
        teacher=TeacherConfig(
            intentions=data_file("quickstart_intentions.yaml"), max_new_tokens=12
        ),
        method=MethodConfig(
            k=8,
            alpha=1.0,
            # Nearly all of Smooth-L1 is its quadratic part then, which forgets deeper than with 1
            # (docs/results.md, one factor at a time).
            beta=8.0,
            center=True,
            reduction="record",
        ),
        optim=OptimConfig(
            lr=3e-4,
            steps=150,
            warmup_steps=5,
            schedule="linear",
            betas=(0.9, 0.95),
            trainable=upper_blocks,
            reuse_frozen=True,
        ),
        evaluate=EvaluateConfig(batch_size=48),
        run=RunConfig(folder="runs/quickstart", checkpoint_every=50),
    )
