"""How far the goals pull the same way: `unteach gradients`, the paper's Fig. 2.

The cosine between the goals' gradients over the last blocks, before the first step of training:
for questions in the one shape that all goals share, and for raw passages where the records have
them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unteach.engine.data.records import GOALS, Goal
from unteach.engine.data.sampler import evenly_spaced
from unteach.engine.data.tokens import Example, collate
from unteach.engine.evaluate.pictures import draw_cosines
from unteach.engine.files import write_atomic, write_json
from unteach.engine.model import PreTrainedModel, blocks, head_of
from unteach.engine.progress import progress, say
from unteach.engine.run import Run
from unteach.engine.stages import target_stage, training_cache
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.methods import find_method
from unteach.engine.train.parallel import World
from unteach.engine.train.supervise import part_of, supervised_loss
from unteach.engine.train.surgery import cosines, gram_matrix
from unteach.engine.training_data import training_streams

LAST_BLOCKS = 3
MOST_EXAMPLES = 64  # of a goal; evenly spaced where there are more
BATCH = 8
FORMS = {"qa": "unified: one question and answer shape", "passage": "raw: passages"}


def measure_gradients(run: Run) -> None:
    """Write gradients.json and gradients.png into the run folder."""
    target_stage(run)
    cache = training_cache(run)
    form_of = {record.id: record.form for record in run.records}
    examples = [e for stream in training_streams(run, cache) for e in stream.examples]
    if run.world.rank == 0:
        found = {}
        model = prepared(run)
        for form, title in FORMS.items():
            groups = {
                goal: [e for e in examples if e.goal == goal and form_of[e.record_id] == form]
                for goal in GOALS
            }
            groups = {goal: group for goal, group in groups.items() if group}
            if len(groups) < 2:
                say(f"gradients: {title}: not measured, fewer than two goals have such records")
                continue
            gram_GG, loss_G = goal_gram(run, model, cache, groups, title)
            found[form] = {
                "title": title,
                "goals": list(groups),
                "examples": [min(len(group), MOST_EXAMPLES) for group in groups.values()],
                "losses": loss_G,
                "lengths": gram_GG.diagonal().sqrt().tolist(),
                "cosines": cosines(gram_GG).tolist(),
            }
        method = run.config.method.name
        write_json(
            run.folder / "gradients.json",
            {"method": method, "blocks": min(LAST_BLOCKS, len(blocks(model))), "forms": found},
        )
        if found:
            write_atomic(run.folder / "gradients.png", draw_cosines(list(found.values())))
        say(f"gradients: {run.folder / 'gradients.json'}")
    run.world.wait()


def prepared(run: Run) -> PreTrainedModel:
    """The model that training starts from, its last blocks alone with gradients."""
    model = run.load(run.base, "float32")
    model.requires_grad_(False)
    for block in blocks(model)[-LAST_BLOCKS:]:
        block.requires_grad_(True)
    return model


def goal_gram(
    run: Run,
    model: PreTrainedModel,
    cache: TeacherCache | None,
    groups: Mapping[Goal, list[Example]],
    title: str,
) -> tuple[Tensor, list[float]]:
    """Inner products of the goals' gradients, each of the method's loss over its own records."""
    method, head = run.config.method, head_of(model, run.tokenizer)
    terms = find_method(method.name).terms
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients: list[list[Tensor | None]] = []
    losses = []
    chosen = {goal: evenly_spaced(group, MOST_EXAMPLES) for goal, group in groups.items()}
    total = sum(len(group) for group in chosen.values())
    with progress(f"gradients, {title.split(':')[0]}", total, unit="records") as advance:
        for group in chosen.values():
            covering = [t for t in terms if any(t.covers(example) for example in group)]
            part, loss = part_of(group, covering, method), 0.0
            for first in range(0, len(part.examples), BATCH):
                batch = collate(
                    part.examples[first : first + BATCH], first_only=method.positions == "first"
                )
                batch = batch.to(model.device)
                output = supervised_loss(model, batch, part, method, head, cache, None)
                output.loss.backward()
                loss += float(output.loss.detach())
                advance(len(batch.examples))
            gradients.append([p.grad for p in parameters])
            losses.append(loss)
            for parameter in parameters:
                parameter.grad = None
    alone = World(0, 1, run.world.device, None)
    return gram_matrix(gradients, alone), losses
