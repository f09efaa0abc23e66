"""The stages of a run, one function each, in the order in which data walk through the house."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

from unteach.engine.data.prefix_search import written
from unteach.engine.data.prompt_files import load_prompts
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.tokens import tokenizer_fingerprint
from unteach.engine.data.writer import open_writer
from unteach.engine.errors import InputError
from unteach.engine.evaluate.card import write_model_card
from unteach.engine.evaluate.harness import harness_scores
from unteach.engine.evaluate.prefix_attack import attack_with_search
from unteach.engine.evaluate.report import (
    Role,
    cached_evaluation,
    check_scored,
    print_table,
    read_steps,
    write_evaluation,
    write_report,
    write_summary,
)
from unteach.engine.evaluate.stress import check_evaluation, stressed
from unteach.engine.evaluate.suites import evaluate, protocol_hash
from unteach.engine.files import alone_in, read_json, write_json
from unteach.engine.progress import say
from unteach.engine.run import (
    Run,
    config_fault,
    digest,
    leave_stamp,
    mend_config,
    records_fingerprint,
    stamp_matches,
)
from unteach.engine.teacher.build import build_cache
from unteach.engine.teacher.cache import TeacherCache, check_fingerprints
from unteach.engine.teacher.manifest import cache_fingerprints, read_manifest
from unteach.engine.teacher.verify import verify_cache
from unteach.engine.train.checkpoint import check_folder
from unteach.engine.train.loop import Job, train
from unteach.engine.train.methods import find_method
from unteach.engine.train.optim import check_trainable
from unteach.engine.train.target import target_config, target_streams
from unteach.engine.training_data import training_records, training_streams


def run_all(run: Run) -> None:
    """The whole walk; finished stages are skipped, killed ones go on."""
    check_evaluation(run.config, run.records)
    target_stage(run)
    train_stage(run, training_cache(run))
    mend_config(run)
    evaluate_stage(run)
    report_stage(run)


def target_stage(run: Run) -> None:
    """Teach the records' facts to the model that will then unlearn them."""
    config = run.config
    check_trainable(config, run.origin)
    if config.target is None:
        return
    output = run.folder / "target" / "model"
    inputs = {
        **base_inputs(run),
        "intentions": digest(run.intentions.model_dump(mode="json") if run.intentions else None),
        "target": config.target.model_dump(mode="json"),
        "refusal": config.teacher.refusal,
        "seed": config.run.seed,
    }
    if stamp_matches(run.folder, "target", inputs, output):
        say("target: done before, skipped")
        return
    streams = target_streams(config, run.tokenizer, run.taught_records, run.intentions)
    _train_alone(
        run,
        Job(
            title="target",
            config=target_config(config, streams),
            base=run.origin,
            tokenizer=run.tokenizer,
            streams=streams,
            cache=None,
            folder=run.folder / "target",
            fingerprint=inputs,
        ),
    )
    if run.world.rank == 0:
        leave_stamp(run.folder, "target", inputs, output)
    run.world.wait()


def base_inputs(run: Run) -> dict[str, str]:
    """What a taught base was made of before any setting: model, tokenizer and records."""
    return {
        "model": run.fingerprint(run.origin),
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "records": records_fingerprint(run.taught_records),
    }


def check_made_of(run: Run) -> None:
    """Refuse to ask models of this folder as if this command's model and records had made them.

    Raises:
        InputError: a stamp of the folder names others; says which.
    """
    stages = {"target": base_inputs(run)} if run.config.target else {}
    for stage, inputs in {**stages, "train": {"model": run.base_fingerprint}}.items():
        path = run.folder / "stamps" / f"{stage}.json"
        made = read_json(path) if path.is_file() else {}
        made = made if isinstance(made, dict) else {}
        if changed := [k for k, v in inputs.items() if made.get(k, v) != v]:
            raise InputError(
                f"The models in {run.folder} were made with another {', '.join(changed)}: give the "
                "settings of that run (--config its config.yaml), or choose another run.folder; "
                "evaluate.extra_records asks further questions."
            )


def _train_alone(run: Run, job: Job) -> None:
    with alone_in(job.folder, "train") if run.world.rank == 0 else nullcontext():
        check_folder(job.folder, job.fingerprint)
        run.remember()
        train(job, run.world)


def teach_stage(run: Run, *, rebuild: bool = False) -> TeacherCache:
    """Build or finish the cache of the prompted teacher; a whole one needs no teacher to open."""
    goals = find_method(run.config.method.name).goals
    records = [record for record in training_records(run) if record.goal in goals]
    folder = run.cache_folder
    manifest = None if rebuild else read_manifest(folder)  # a damaged one is no obstacle to another
    fingerprints = cache_fingerprints(
        run.config, run.tokenizer, records, run.intentions, run.base_fingerprint
    )
    if manifest is not None and manifest.complete:
        say("teach: done before, skipped")
        return TeacherCache.open(folder, expected=fingerprints)
    with alone_in(folder.parent, f"teach.{folder.name}") if run.world.rank == 0 else nullcontext():
        if manifest is not None:
            check_fingerprints(folder, manifest, fingerprints)
        run.remember()
        return build_cache(
            run.config,
            run.load(run.base, run.config.teacher.dtype),
            run.tokenizer,
            records,
            run.intentions,
            folder,
            weights_fingerprint=run.base_fingerprint,
            rebuild=rebuild,
        )


def training_cache(run: Run) -> TeacherCache | None:
    """The cache that the method trains from; None where records and refusal text are enough."""
    if find_method(run.config.method.name).needs_cache(run.config.teacher):
        cache = teach_stage(run)
        if cache.manifest.approximate:
            say(
                f"teach: form {cache.manifest.form} of the cache is approximate; "
                "teacher.form=hidden is exact"
            )
        return cache
    say(f"teach: method {run.config.method.name} needs no teacher, skipped")
    return None


def train_stage(run: Run, cache: TeacherCache | None) -> None:
    """Train the student, from the cached teacher or from the records, and export it."""
    config, output = run.config, run.folder / "model"
    streams = training_streams(run, cache)
    inputs = {
        "model": run.base_fingerprint,
        "cache": digest(cache.manifest.model_dump(mode="json")) if cache else None,
        "examples": digest(
            [[e.record_id, e.goal, e.context, e.response] for s in streams for e in s.examples]
        ),
        "method": config.method.model_dump(mode="json"),
        "optim": config.optim.model_dump(mode="json"),
        "mix": {str(goal): count for goal, count in config.data.mix.items()},
        "pack_tokens": config.data.pack_tokens,
        "dtype": [config.model.dtype, config.parallel.dtype],
        "seed": config.run.seed,
    }
    if stamp_matches(run.folder, "train", inputs, output):
        say("train: done before, skipped")
        return
    _train_alone(
        run,
        Job(
            title=f"train {config.method.name}",
            config=config,
            base=run.base,
            tokenizer=run.tokenizer,
            streams=streams,
            cache=cache,
            folder=run.folder,
            fingerprint=inputs,
            frozen=run.frozen,
        ),
    )
    if run.world.rank == 0:
        leave_stamp(run.folder, "train", inputs, output)
        if cache is not None and cache.manifest.form == "topk":
            covered = fmean(line["coverage"] for line in read_steps(run.folder / "train.jsonl"))
            if covered < 1:
                say(
                    f"train: the cache knew {covered:.1%} of the student's top-K ids; the others "
                    "carried no loss (a larger teacher.top covers more)"
                )
    run.world.wait()


def verify_stage(run: Run, cache: TeacherCache) -> None:
    """Compare the cache with the teacher's own forward and with its checksums.

    Raises:
        InputError: they disagree.
    """
    if run.world.rank == 0:
        records = [r for r in run.split("train") if r.id in cache.entries]
        report = verify_cache(
            run.config,
            run.load(run.base, run.config.teacher.dtype),
            run.tokenizer,
            records,
            run.intentions,
            cache,
        )
        say(f"verify: {report}")
        if not report.passed:
            raise InputError(
                f"The teacher cache in {cache.folder} does not hold what its teacher says: "
                "`unteach teach --rebuild` makes it again."
            )
    run.world.wait()


def evaluate_stage(run: Run) -> None:
    """Score the base and the trained model by one protocol, in float32."""
    trained = run.folder / "model"
    if not (trained / "config.json").is_file():
        raise InputError(f"{trained} holds no trained model yet: `unteach train` makes one.")
    if run.world.rank == 0:
        check_made_of(run)
        mmlu = check_evaluation(run.config, run.records)
        config, words = run.config, tokenizer_fingerprint(run.tokenizer)
        protocol = protocol_hash(config, run.records, mmlu, words)
        roles: tuple[tuple[Role, str], ...] = (("base", run.base), ("model", str(trained)))
        for role, path in roles:
            weights = run.fingerprint(path)
            known = result = cached_evaluation(run.folder, role, protocol, weights)
            if result is not None and not result.unjudged:
                say(f"evaluate {role}: done before, skipped")
            else:
                if result is not None:
                    say(f"evaluate {role}: {result.unjudged} answers are unjudged, asked again")
                run.remember_scoring()
                model = run.load(path, "float32")
                result = evaluate(
                    config, model, run.tokenizer, run.records, mmlu=mmlu, title=f"evaluate {role}"
                )
                load = partial(run.load, path, "float32")
                result = stressed(config, load, run.tokenizer, run.records, result)
            if known is not None and known.unjudged < result.unjudged:
                say(f"evaluate {role}: {result.unjudged} are unjudged this time, the first kept")
                result = known
            write_evaluation(run.folder, result, role, protocol, weights)
        print_table(write_summary(run.folder))
    run.world.wait()


def prefix_stage(run: Run, target: str, *, rounds: int, children: int, per_question: bool) -> None:
    """Search adversarial prefixes against the base or the trained model, and attack with them.

    Raises:
        InputError: there is no such target, or it is not trained yet.
    """
    paths = {"base": run.base, "model": str(run.folder / "model")}
    ours = target == "model" or run.config.target is not None  # any other base may be a hub id
    if target not in paths or (ours and not (Path(paths[target]) / "config.json").is_file()):
        raise InputError(
            f"There is no target {target} here: it is `base` or `model`, and `unteach train` makes "
            "both."
        )
    if run.world.rank == 0:
        check_made_of(run)
        config = run.config
        writer = open_writer(config.writer, run.folder, run.world.device)
        prompts = load_prompts(config.standardize.prompts)
        attack_with_search(
            run.load(paths[target], "float32"),
            run.tokenizer,
            run.records,
            config.evaluate,
            run.folder / "prefixes" / target,
            rounds=rounds,
            children=children,
            per_question=per_question,
            seed=config.run.seed,
            proposer=None if writer is None else written(writer, prompts, Rejects()),
        )
    run.world.wait()


def report_stage(run: Run) -> None:
    """Write report.md, report.html, the pictures, and the scores into the model card.

    Raises:
        InputError: there are no scores, other weights than those were scored, or config.yaml is
            not whole.
    """
    if run.world.rank == 0:
        model = run.folder / "model"
        if model.is_dir():
            check_scored(run.folder, run.fingerprint(str(model)))
            if fault := config_fault(run.folder):
                raise InputError(
                    f"{fault}: give `unteach run` with the settings of this run, which writes it "
                    "again, or the report could not say how the model was made."
                )
        summary = write_report(run.folder)
        if model.is_dir():
            write_model_card(model, run.remembered, summary)
        else:
            say(f"report: {model} is gone, so no model card is written")
        say(f"report: {run.folder / 'report.md'} and {run.folder / 'report.html'}")
    run.world.wait()


def harness_stage(run: Run, tasks: str, include: Path | None = None) -> None:
    """Score the exported model by lm-eval, into evaluation/lm_eval.json."""
    if run.world.rank == 0:
        scores = harness_scores(
            run.folder / "model",
            tasks,
            batch_size=run.config.evaluate.batch_size,
            device=str(run.world.device),
            include=include,
        )
        found = {name: asdict(score) for name, score in scores.items()}
        write_json(run.folder / "evaluation" / "lm_eval.json", found)
        for name, score in scores.items():
            say(
                f"lm-eval {name}: {score.value:.1f} [{score.low:.1f}–{score.high:.1f}], N {score.n}"
            )
    run.world.wait()
