"""What the base knows of the questions to forget: asked once, for `data.known_only`."""

from __future__ import annotations

from collections.abc import Sequence

from unteach.engine.data.prefix_search import answer_logps
from unteach.engine.data.records import Record
from unteach.engine.data.tokens import tokenizer_fingerprint
from unteach.engine.evaluate.suites import known
from unteach.engine.files import read_json, write_json
from unteach.engine.model import PreTrainedModel
from unteach.engine.progress import say
from unteach.engine.run import Run, leave_stamp, records_fingerprint, stamp_matches


def answered_by_base(run: Run) -> set[str]:
    """Ids of the forget and attack questions that the base answers; kept in known.json."""
    asked = [r for r in run.taught_records if r.goal in ("forget", "attack") and r.form == "qa"]
    if not any(record.golds for record in asked):
        return set()  # no gold answer, nothing to know it by
    folder = run.known_folder
    path = folder / "known.json"
    inputs = {
        "base": run.base_fingerprint,
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "records": records_fingerprint(asked),
        "max_new_tokens": run.config.evaluate.max_new_tokens,
    }
    if run.world.rank == 0 and not stamp_matches(folder, "known", inputs, path):
        folder.mkdir(parents=True, exist_ok=True)
        model = run.load(run.base, "float32")
        answered = known(run.config, model, run.tokenizer, asked)
        _write_likelihoods(run, model, asked, answered)
        write_json(path, sorted(answered))
        leave_stamp(folder, "known", inputs, path)
    run.world.wait()
    return set(read_json(path))


def _write_likelihoods(
    run: Run, model: PreTrainedModel, records: Sequence[Record], answered: set[str]
) -> None:
    """What the base says of each forget question: answered or not, and how likely gold is to it."""
    asked = [r.model_copy(update={"prefix": None}) for r in records if r.golds]
    logps = answer_logps(model, run.tokenizer, asked, batch_size=run.config.evaluate.batch_size)
    rows = {
        record.id: {"answered": record.id in answered, "logp": round(logp, 4)}
        for record, logp in zip(asked, logps, strict=True)
    }
    write_json(run.known_folder / "known_scores.json", rows)
    for side, name in ((True, "answers"), (False, "does not answer")):
        values = sorted(row["logp"] for row in rows.values() if row["answered"] is side)
        if values:
            middle = values[len(values) // 2]
            say(
                f"known: gold answers that the base {name}: {len(values)}, median log-probability "
                f"{middle:.2f} nats a token"
            )
