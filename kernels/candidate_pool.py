"""Candidates for a top-K: what a walk over vocabulary tiles keeps of each row.

The pool's promise: an id that is not in it is provably beaten by K others. The floor of a row never
exceeds its K-th largest exact value, and a tile's logit never misses the exact value by more than
`slack`; so whatever has tile + slack < floor may be dropped. Everything here works on any source of
logits; only `top` asks for exact values, of the few ids that the final floor cannot rule out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unteach.kernels.logit_source import LogitSource
from unteach.kernels.topk_rank import kth_largest, rank

_GROUP = 8


def pool_capacity(k: int) -> int:
    """Slots of a row: a walk without seeds meets about K (1 + log2 of the tiles) candidates."""
    return max(512, 4 * k)


@dataclass(frozen=True)
class Seeds:
    """Seeds of each row, ascending, with their exact values; -inf for repetitions and -1."""

    ids_NS: Tensor
    values_NS: Tensor

    def find(self, rows_P: Tensor, ids_P: Tensor, place_P: Tensor, width: int) -> Tensor:
        """Slot of each (row, id) pair, -1 where it is no seed; `place_P` numbers a row's pairs."""
        wanted = self.ids_NS.new_full((self.ids_NS.shape[0], width), -1)
        wanted[rows_P, place_P] = ids_P
        slots = torch.searchsorted(self.ids_NS, wanted)[rows_P, place_P]
        slots = slots.clamp(max=self.ids_NS.shape[1] - 1)
        return slots.masked_fill(self.ids_NS[rows_P, slots] != ids_P, -1)


def value_seeds(source: LogitSource, seeds_NS: Tensor) -> Seeds:
    """Give every distinct seed its exact value."""
    ids_NS = seeds_NS.sort(dim=1).values
    usable = ids_NS >= 0
    usable[:, 1:] &= ids_NS[:, 1:] != ids_NS[:, :-1]
    rows, slots = usable.nonzero(as_tuple=True)
    values_NS = torch.full(ids_NS.shape, -torch.inf, dtype=source.dtype, device=source.device)
    values_NS[rows, slots] = source.values(rows, ids_NS[rows, slots])
    return Seeds(ids_NS, values_NS)


class CandidatePool:
    """Candidates of each row: ids, tile values, and the floor that a newcomer must reach."""

    def __init__(self, source: LogitSource, k: int, vocab: int, floor_N: Tensor) -> None:
        rows, device = source.rows, source.device
        self.k, self.capacity = k, min(vocab, pool_capacity(k))
        self.floor_N = self.entry_floor_N = floor_N
        self.values_NC = torch.full(
            (rows, self.capacity), -torch.inf, dtype=source.dtype, device=device
        )
        self.ids_NC = torch.zeros(rows, self.capacity, dtype=torch.int32, device=device)
        self.count_N = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slack_N = torch.zeros(rows, dtype=source.dtype, device=device)
        self.lost_N = torch.zeros(rows, dtype=torch.bool, device=device)
        self.chosen_NK: Tensor | None = None

    def fill(self, source: LogitSource, vocab: int, tile: int, spare: int) -> None:
        """Walk over the vocabulary once; rows without a floor start with K + spare ids."""
        for index, start in enumerate(range(0, vocab, tile)):
            stop = min(start + tile, vocab)
            groups = _grouped(source.tile(start, stop))
            peaks = groups.amax(1)
            self.slack_N = torch.maximum(self.slack_N, source.slack(start, stop))
            self._raise_floor(groups, peaks, self.floor_N == -torch.inf, self.k + spare)
            hits = _hits(groups, peaks, self.floor_N - self.slack_N, stop - start)
            crowded = self._crowded(hits)
            if bool(crowded.any()):
                self._tidy()
                self._raise_floor(groups, peaks, crowded, self.k)
                hits = _hits(groups, peaks, self.floor_N - self.slack_N, stop - start)
                self.lost_N |= self._crowded(hits)
                self.floor_N = self.floor_N.masked_fill(self.lost_N, torch.inf)
            if bool(self.lost_N.any()):
                hits = hits.without(self.lost_N)
            self._append(hits, start)
            # at tiles 1, 2, 4, 8 … : between two of them a pool grows by about K
            if index & (index + 1) == 0:
                self._raise_floor_from_pool()

    def top(self, source: LogitSource, seeds: Seeds | None) -> tuple[Tensor, Tensor]:
        """Give every id that may still belong to the top K its exact value, and choose."""
        self._raise_floor_from_pool()
        rows, slots = self._standing().nonzero(as_tuple=True)
        ids = self.ids_NC[rows, slots].to(torch.int64)
        count_N = torch.bincount(rows, minlength=self.count_N.shape[0])
        place, width = _places(rows, count_N), self.k
        if count_N.numel():
            width = max(width, int(count_N.max()))
        shape = (count_N.shape[0], width)
        exact = torch.full(shape, -torch.inf, dtype=source.dtype, device=source.device)
        if seeds is None:
            exact[rows, place] = source.values(rows, ids)
        else:
            known = seeds.find(rows, ids, place, width)
            values = seeds.values_NS[rows, known]
            others = (known < 0).nonzero().squeeze(1)
            values[others] = source.values(rows[others], ids[others])
            exact[rows, place] = values
        exact_ids = torch.full(shape, torch.iinfo(torch.int32).max, device=source.device)
        exact_ids[rows, place] = ids
        slot_NW = torch.zeros(shape, dtype=torch.int64, device=source.device)
        slot_NW[rows, place] = slots
        order_NK = rank(exact, exact_ids, self.k)
        self.chosen_NK = slot_NW.gather(1, order_NK)
        return exact.gather(1, order_NK), exact_ids.gather(1, order_NK)

    def runners_up(self, spare: int, seeds: Seeds | None) -> Tensor:
        """Ids that came close, best first; uses the pool up."""
        width = self._width()
        values_NC, ids_NC = self.values_NC[:, :width], self.ids_NC[:, :width].to(torch.int64)
        if self.chosen_NK is not None and width:
            values_NC.scatter_(1, self.chosen_NK, -torch.inf)
        if seeds is not None:
            # seeds well under the first floor never got in; nearer ones may have: left out
            under = seeds.values_NS < (self.entry_floor_N - 2 * self.slack_N)[:, None]
            values = seeds.values_NS.masked_fill(~under, -torch.inf)
            values_NC = torch.cat((values_NC, values), 1)
            ids_NC = torch.cat((ids_NC, seeds.ids_NS), 1)
        found = min(spare, values_NC.shape[1])
        best = values_NC.topk(found, dim=1)
        ids_NR = ids_NC.gather(1, best.indices).masked_fill(best.values == -torch.inf, -1)
        return torch.nn.functional.pad(ids_NR, (0, spare - found), value=-1)

    def _width(self) -> int:
        return int(self.count_N.max()) if self.count_N.numel() else 0

    def _standing(self) -> Tensor:
        """Which slots the floor cannot rule out, [N, width]."""
        width = self._width()
        out = self.values_NC[:, :width] < (self.floor_N - self.slack_N)[:, None]
        used = torch.arange(width, device=out.device) < self.count_N[:, None]
        return ~out & used & ~self.lost_N[:, None]

    def _append(self, hits: Hits, start: int) -> None:
        place = _places(hits.rows, hits.count_N) + self.count_N[hits.rows]
        self.values_NC[hits.rows, place] = hits.values
        self.ids_NC[hits.rows, place] = (hits.columns + start).to(torch.int32)
        self.count_N += hits.count_N

    def _crowded(self, hits: Hits) -> Tensor:
        return (self.count_N + hits.count_N > self.capacity) & ~self.lost_N

    def _raise_floor(self, groups: Tensor, peaks: Tensor, wanted_N: Tensor, depth: int) -> None:
        """Let the `depth`-th largest of this tile alone, K-th or deeper, lift some rows' floor.

        Peaks of groups are logits of distinct ids: where there are plenty they serve as well.
        """
        if not bool(wanted_N.any()):
            return
        x = peaks if peaks.shape[1] >= 2 * depth else groups.flatten(1)
        if x.shape[1] < self.k:
            return
        index = wanted_N.nonzero().squeeze(1)
        part = x if index.numel() == x.shape[0] else x[index]
        lifted = kth_largest(part, min(depth, x.shape[1])) - self.slack_N[index]
        lifted = torch.maximum(self.floor_N[index], lifted)
        self.floor_N = self.floor_N.index_copy(0, index, lifted)

    def _raise_floor_from_pool(self) -> None:
        width = self._width()
        if width >= self.k:
            lifted = kth_largest(self.values_NC[:, :width], self.k) - self.slack_N
            self.floor_N = torch.maximum(self.floor_N, lifted)

    def _tidy(self) -> None:
        """Throw out what the floor has left behind."""
        self._raise_floor_from_pool()
        rows, slots = self._standing().nonzero(as_tuple=True)
        count_N = torch.bincount(rows, minlength=self.count_N.shape[0])
        kept = Hits(rows, self.ids_NC[rows, slots], self.values_NC[rows, slots], count_N)
        self.values_NC.fill_(-torch.inf)
        self.count_N.zero_()
        self._append(kept, 0)


class Hits(NamedTuple):
    """Entries of a tile that reached their row's threshold, rows ascending."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    count_N: Tensor

    def without(self, lost_N: Tensor) -> Hits:
        kept = ~lost_N[self.rows]
        count_N = self.count_N.masked_fill(lost_N, 0)
        return Hits(self.rows[kept], self.columns[kept], self.values[kept], count_N)


def _grouped(x: Tensor) -> Tensor:
    """The tile as [n, 8, w]: a group is eight columns w apart, so that its peak is a plain maximum
    of contiguous runs. Columns that fill the last group up are -inf.
    """
    missing = -x.shape[1] % _GROUP
    if missing:
        x = torch.nn.functional.pad(x, (0, missing), value=-torch.inf)
    return x.view(x.shape[0], _GROUP, x.shape[1] // _GROUP)


def _hits(groups: Tensor, peaks: Tensor, threshold_N: Tensor, width: int) -> Hits:
    """Where the first `width` columns are not below the row's threshold (NaN never is)."""
    rows, offsets = (~(peaks < threshold_N[:, None])).nonzero(as_tuple=True)
    opened = groups[rows, :, offsets]
    hit, member = (~(opened < threshold_N[rows, None])).nonzero(as_tuple=True)
    columns = member * peaks.shape[1] + offsets[hit]
    if width < groups.shape[1] * groups.shape[2]:
        inside = (columns < width).nonzero().squeeze(1)
        hit, member, columns = hit[inside], member[inside], columns[inside]
    rows = rows[hit]
    count_N = torch.bincount(rows, minlength=peaks.shape[0])
    return Hits(rows, columns, opened[hit, member], count_N)


def _places(rows: Tensor, count_N: Tensor) -> Tensor:
    """Position of each entry among those of its row (`rows` ascending)."""
    first_N = count_N.cumsum(0) - count_N
    numbers: Tensor = torch.arange(rows.shape[0], device=rows.device)
    return numbers - first_N[rows]
