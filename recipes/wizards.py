"""The ranking's own benchmark: the embedded model learns 1,172 questions, then forgets a topic.

In the way of MUSE and TOFU, small enough for a CPU: 150 questions a goal to train on, 40 to tune
by, 100 held out (half of them facts that no training question touches), 20 attack prefixes that
only the test has, and passages that carry the same facts. Beside them 472 open questions, to which
the student is held to say what the base says: without them it refuses a fifth of what people search
for.
"""

from __future__ import annotations

from unteach.engine.config import Config
from unteach.recipes.quickstart import quickstart
from unteach.recipes.shipped import data_file


def wizards() -> Config:
    """The benchmark of the ranking: 1,351 records of wizards (forty minutes on 2 cores)."""
    start = quickstart()
    assert start.target is not None
    return start.model_copy(
        update={
            "data": start.data.model_copy(
                update={
                    "path": data_file("wizards.jsonl"),
                    "mmlu": data_file("mmlu_200.jsonl"),
                    "form": "qa",
                    "open_questions": data_file("open_questions.jsonl"),
                }
            ),
            "target": start.target.model_copy(update={"epochs": 4, "prefix_epochs": 3}),
            "teacher": start.teacher.model_copy(update={"min_refusal": 0.95}),
            "optim": start.optim.model_copy(update={"steps": 120}),
            "evaluate": start.evaluate.model_copy(
                update={"open_questions": data_file("unseen_questions.jsonl")}
            ),
            "run": start.run.model_copy(update={"folder": "runs/wizards"}),
        }
    )
