"""The paper's benchmarks on its model: rows of the hub, or yours with `--set data.path=FOLDER`.

Each needs one large GPU and access to Llama-3.2-3B-Instruct. What a benchmark has no rows for
(general questions, neighbours) stands beside it in files that ship.
"""

from __future__ import annotations

from unteach.engine.config import (
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TargetConfig,
    TeacherConfig,
)
from unteach.engine.data.settings import SourceName, StandardizeConfig
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.recipes.shipped import data_file

PAPER_MODEL = "meta-llama/Llama-3.2-3B-Instruct"


def muse_books() -> Config:
    """MUSE-Books: Llama-3.2-3B-Instruct forgets Harry Potter (hub data; one large GPU)."""
    return _benchmark(
        "muse-books",
        "quickstart_intentions.yaml",
        topic="Harry Potter",
        terms=("Hogwarts", "Hermione", "Dumbledore", "Voldemort", "Quidditch", "Gryffindor"),
    )


def wmdp_cyber() -> Config:
    """WMDP-Cyber: Llama-3.2-3B-Instruct forgets attacks on computers (hub data; one large GPU)."""
    return _benchmark(
        "wmdp-cyber",
        "wmdp_cyber_intentions.yaml",
        topic="attacks on computer systems",
        terms=("exploit", "malware", "payload", "shellcode", "Metasploit"),
        beside=("cyber_neighbors.jsonl", "quickstart.jsonl"),
    )


def rwku() -> Config:
    """RWKU: Llama-3.2-3B-Instruct forgets Stephen King (hub data; one large GPU)."""
    return _benchmark("rwku", "rwku_intentions.yaml", topic="Stephen King", subset="Stephen King")


def tofu() -> Config:
    """TOFU: Llama-3.2-3B-Instruct learns invented authors, then forgets some (one large GPU)."""
    config = _benchmark("tofu", "tofu_intentions.yaml", topic="authors who do not exist")
    return config.model_copy(
        update={
            "target": TargetConfig(
                epochs=5, prefix_epochs=1, intention_epochs=1, lr=1e-5, batch_size=32
            ),
            "data": config.data.model_copy(update={"known_only": False}),
        }
    )


def _benchmark(
    name: SourceName,
    intentions: str,
    *,
    topic: str,
    terms: tuple[str, ...] = (),
    subset: str | None = None,
    beside: tuple[str, ...] = ("quickstart.jsonl",),
) -> Config:
    return Config(
        model=ModelConfig(path=PAPER_MODEL),
        data=DataConfig(
            source=name,
            subset=subset,
            beside=tuple(data_file(file) for file in beside),
            mmlu=data_file("mmlu.jsonl"),
            known_only=True,
            mix={"forget": 6, "attack": 6, "neighbor": 12, "general": 8},
        ),
        teacher=TeacherConfig(
            intentions=data_file(intentions), dtype="bfloat16", top=64, max_new_tokens=64
        ),
        method=MethodConfig(k=32, alpha=1.0, beta=8.0, center=True, reduction="record"),
        optim=OptimConfig(lr=1e-5, steps=200, warmup_steps=10, schedule="linear"),
        parallel=ParallelConfig(dtype="bfloat16", checkpointing="full"),
        evaluate=EvaluateConfig(batch_size=64),
        run=RunConfig(folder=f"runs/{name}", checkpoint_every=100),
        standardize=StandardizeConfig(topic=topic, terms=terms),
    )
