"""The embedded model forgets Harry Potter: minutes on two CPU cores, nothing else to download."""

from __future__ import annotations

from unteach.engine.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TargetConfig,
    TeacherConfig,
)
from unteach.recipes.shipped import data_file


def quickstart() -> Config:
    """SmolLM2-135M-Instruct forgets Harry Potter, keeps its neighbours (minutes on 2 cores)."""
    upper_half = r"model\.(layers\.(1[5-9]|2\d)\..*|norm\.weight)"
    return Config(
        model=ModelConfig(path="embedded"),
        data=DataConfig(
            path=data_file("quickstart.jsonl"),
            mmlu=data_file("mmlu.jsonl"),
            mix={"forget": 3, "attack": 3, "neighbor": 4, "general": 2},
        ),
        target=TargetConfig(),
        teacher=TeacherConfig(intentions=data_file("quickstart_intentions.yaml")),
        method=MethodConfig(name="bitopk", k=8, alpha=1.0, center=True, gate=0.2),
        optim=OptimConfig(lr=1e-4, steps=60, trainable=upper_half),
        evaluate=EvaluateConfig(),
        run=RunConfig(folder="runs/quickstart"),
    )
