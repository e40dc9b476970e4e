"""Which sites, and which layout of each. Exhaustive where that is affordable, otherwise grown and swapped.

Every preference between candidates depends on the candidates alone, never on what else there is, as long as the search
is exhaustive: so a site that is not used may vanish without changing the plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from topology.candidate import Assembler, Candidate
from topology.constraints import Constraints
from topology.exact import Exact
from topology.fold import folded_layouts
from topology.islands import Layout, cluster_layouts, clusters, forced_clusters, forced_layouts, site_layouts
from topology.model import ModelSpec
from topology.pack import Packer
from topology.picture import Node, Picture

#: Sets of sites of one size that are looked at one by one; above, sets are grown from every site and improved by swaps.
LISTED_SETS: Final = 500
#: Choices of layouts that are tried one by one for a set of sites; above, one site's layout is changed at a time.
LISTED_LAYOUTS: Final = 48
#: The same where an override narrows the choices down by itself.
LISTED_FORCED: Final = 4096
#: Work spent at most, in units of about 0.1 ms (`Assembler.work`): bounds planning to some seconds on any mesh.
MAX_WORK: Final = 20_000

#: Where there are more sites than this, the search ends when so many more of them have brought nothing better.
LISTED_SITES: Final = 12
#: A site of more devices than this makes a mesh large as well.
LISTED_DEVICES: Final = 24
IDLE_SIZES: Final = 3
#: Objectives for which the exact program weighs every plan.
PROVED: Final = ("latency", "first_token", "throughput")
#: Objectives in which a rate counts; and multiples of the least pace of a ring that are tried where latency does too.
RATES: Final = ("throughput", "balanced", "cost")
PACES: Final = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0)
QUICK_WORK: Final = 700
#: Share of the work that is spent on a large mesh, where much is done besides (measured: 1,000 devices within 5 s).
LARGE_SHARE: Final = 0.4
#: Layouts of a site of a large mesh that are all looked at.
KEPT_LAYOUTS: Final = 6
#: Work spent on other plans where a ring for throughput is found already.
COMPARED: Final = 1_500
#: Seconds of a unit of work.
WORK_S: Final = 1e-4

Block = tuple[Layout, ...]  # the layouts to choose from, for one site or one cluster


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best candidate that meets every constraint, if any; and the fastest that meets all but the latency limit."""

    best: Candidate | None
    fastest: Candidate | None
    cut_short: bool


def is_large(sites: int, devices: int) -> bool:
    """Whether a mesh of so many sites, of so many devices at most, is too large to look at everything."""
    return sites > LISTED_SITES or devices > LISTED_DEVICES


class Search:
    """One search over one picture."""

    def __init__(
        self,
        picture: Picture,
        model: ModelSpec,
        context: int,
        constraints: Constraints,
        strategy: str,
        *,
        max_work: float = MAX_WORK,
        like: Search | None = None,
    ) -> None:
        """`like`: a search of the same picture and request for another objective, whose preparations are used."""
        self.large = is_large(len(picture.sites), max((len(nodes) for nodes in picture.nodes.values()), default=0))
        self._max_work = max_work * LARGE_SHARE if self.large else max_work
        self.proved: tuple[object, ...] = ()  # the identity of the plan that was proved to be the best of all
        self.picture, self.model, self.constraints, self.strategy = picture, model, constraints, strategy
        self.assembler = Assembler(picture, model, context, constraints)
        self._found: dict[frozenset[str], Candidate | None] = {}
        self._needed = model.layers if self.large else self.assembler.least_bytes
        self._layouts: dict[str, Block]
        self._clusters: dict[frozenset[str], Block]
        self._room: dict[str, int]
        if like is not None:
            self.assembler.share(like.assembler)
            self._layouts, self._clusters, self._room = like._layouts, like._clusters, like._room
            return
        self._few: dict[tuple[object, ...], list[tuple[list[list[int]], bool]]] = {}
        self._layouts = {name: self._block(name) for name in picture.sites}
        self._clusters = self._near()
        self._room = {name: self._holds(name) for name in picture.sites}

    def run(self) -> Outcome:
        """Look at one site, then at pairs, and so on, as far as `min_latency` and the limits ask."""
        wish = self.constraints.wish
        proved = self._proved()
        best = min(filter(self.meets, proved), key=lambda candidate: candidate.cost(wish), default=None)
        fastest = min(proved, key=lambda candidate: candidate.cost("latency"), default=None)
        if best is not None and not self.constraints.standbys:
            if wish in PROVED and self.constraints.concurrency is None:
                self.proved = best.identity
            return Outcome(best, fastest, False)  # with standbys the next best plans are wanted too: they need room
        for broad in self._broad():
            if self.meets(broad) and (best is None or broad.cost(wish) < best.cost(wish)):
                best = broad
        if best is not None and self.large and wish == "throughput":  # sets of few sites are only to be compared with
            self._max_work = min(self._max_work, self.assembler.work + COMPARED)
        idle = 0
        for size in range(1, self._most_sites() + 1):
            before, any_fits = best, False
            for names in self._sets(size, best):
                candidate = self.on(names)
                if candidate is None:
                    continue
                any_fits = True
                if fastest is None or candidate.cost("latency") < fastest.cost("latency"):
                    fastest = candidate
                if self.meets(candidate) and (best is None or candidate.cost(wish) < best.cost(wish)):
                    best = candidate
                if best is not None and self.exhausted:
                    break
            if (best is not None and wish == "fewest_sites") or self.exhausted:
                break
            idle = idle + 1 if any_fits and best is before else 0
            if idle >= IDLE_SIZES and len(self.picture.sites) > LISTED_SITES:
                break
        return Outcome(best, fastest, self.exhausted)

    def _broad(self) -> Iterator[Candidate]:
        """On a large mesh, for a rate: rings over as many sites as a pace needs, the least first (`topology.pack`)."""
        asked = self.constraints
        if not self.large or asked.forced or asked.private or asked.wish not in RATES:
            return
        if self.strategy == "tensor_parallelism":
            return
        quick = self._max_work < QUICK_WORK  # a user waits for a job that lost a site
        paces = (1.0,) if asked.wish == "throughput" else PACES[::4] if quick else PACES
        yield from self.packer.rings_of(self.picture.sites, paces=paces)

    @cached_property
    def packer(self) -> Packer:
        """What sites carry at a pace."""
        return Packer(self.assembler, single=self.strategy == "pipeline")

    def _proved(self) -> list[Candidate]:
        """Candidates of the exact program, where the mesh is small enough and the question is one it can answer.

        The best of them is the best of all, unless it misses a limit: then others may meet it.
        """
        asked = self.constraints
        if asked.forced or (self.strategy == "tensor_parallelism" and asked.wish != "latency"):
            return []
        if asked.private or asked.codes:
            return []  # devices that serve both ends, and hops that depend on a code, are not in the program
        if not self.picture.sites:
            return []
        widest = 1 if self.strategy == "pipeline" else self.model.heads
        exact = Exact(self.assembler, widest=widest, near=self._clusters, max_s=self._max_work * WORK_S / 4)
        return exact.candidates() if exact.affordable else []

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent."""
        return self.assembler.work >= self._max_work

    def meets(self, candidate: Candidate) -> bool:
        """Whether the candidate is within every limit."""
        return candidate.excess == 0

    def on(self, names: frozenset[str]) -> Candidate | None:
        """The candidate for exactly these sites, by the strategy's own preference among layouts."""
        if names not in self._found:
            self._found[names] = self._preferred(names)
        return self._found[names]

    def _preferred(self, names: frozenset[str]) -> Candidate | None:
        wish = self.constraints.wish
        if self.strategy == "tensor_parallelism" and wish != "latency" and not self.constraints.forced:
            wide = self._least(
                self._choose([self._only(block, widest=True) for block in blocks])
                for blocks in self._partitions(names)
                if any(layout.widest and not layout.alone for block in blocks for layout in block)
            )
            if wide is not None:
                narrow = self._choose([self._only(block, widest=False) for block in self._singly(names)])
                if narrow is None or wide.token_s <= narrow.token_s:
                    return wide
        return self._least(self._choose(blocks) for blocks in self._partitions(names))

    def _least(self, candidates: Iterable[Candidate | None]) -> Candidate | None:
        best: Candidate | None = None
        wish = self.constraints.wish
        for candidate in candidates:
            if candidate is not None and (best is None or candidate.cost(wish) < best.cost(wish)):
                best = candidate
            if self.exhausted:
                break
        return best

    def family(self, names: frozenset[str], kind: str) -> Candidate | None:
        """The best on these sites of one kind: "single", "tensor_parallelism" or "pipeline". To explain a choice."""
        blocks = self._singly(names)
        if kind == "single":
            wanted = [tuple(layout for layout in block if layout.alone) for block in blocks]
        elif kind == "tensor_parallelism":
            split = [tuple(x for x in block if len(x.islands) == 1 and not x.alone) for block in blocks]
            wanted = [wide or tuple(x for x in block if x.alone) for wide, block in zip(split, blocks, strict=True)]
        else:
            wanted = [tuple(x for x in b if all(len(island) == 1 for island in x.islands)) for b in blocks]
            if len(names) == 1:
                wanted = [tuple(x for x in block if len(x.islands) > 1) for block in wanted]
        return self._choose(wanted)

    def _choose(self, blocks: Sequence[Block]) -> Candidate | None:
        """The best choice of one layout from each block."""
        if not all(blocks):
            return None
        if self.constraints.forced:
            stages = self.constraints.stages
            choices: Iterable[Block] = (
                choice
                for choice in itertools.islice(itertools.product(*blocks), LISTED_FORCED)
                if stages is None or sum(len(layout.islands) for layout in choice) == stages
            )
            return self._best_of(choices)
        if math.prod(len(block) for block in blocks) <= LISTED_LAYOUTS:
            return self._best_of(itertools.product(*blocks))
        return self._descend(blocks)

    def _best_of(self, choices: Iterable[Block]) -> Candidate | None:
        return self._least(self._assemble(choice) for choice in choices)

    def _assemble(self, choice: Sequence[Layout]) -> Candidate | None:
        return self.assembler.best([island for layout in choice for island in layout.islands])

    def _descend(self, blocks: Sequence[Block]) -> Candidate | None:
        """Change one site's layout at a time while that helps, from the roomiest choice and from the fastest."""
        wish = self.constraints.wish
        starts = [
            [max(block, key=self._roominess) for block in blocks],
            [max(block, key=lambda layout: sum(node.speed for node in layout.islands[0])) for block in blocks],
        ]
        best: Candidate | None = None
        for start in starts:
            choice, here = start, self._assemble(start)
            improved = True
            while improved and not self.exhausted:
                improved = False
                for index, block in enumerate(blocks):
                    for layout in block:
                        if self.exhausted and here is not None:
                            break
                        changed = [*choice[:index], layout, *choice[index + 1 :]]
                        candidate = self._assemble(changed) if layout != choice[index] else None
                        if candidate is not None and (here is None or candidate.cost(wish) < here.cost(wish)):
                            choice, here, improved = changed, candidate, True
            if here is not None and (best is None or here.cost(wish) < best.cost(wish)):
                best = here
        return best

    def _roominess(self, layout: Layout) -> tuple[int, int]:
        room = self._layers(layout) if self.large else layout.usable_bytes
        return room, -len(layout.islands)

    def _site(self, name: str) -> Block:
        nodes = self.picture.nodes[name]
        if self.constraints.forced:
            return tuple(forced_layouts(nodes, self.model, self.constraints))
        folded = name == self.picture.origin and self.constraints.private
        twice = folded_layouts(nodes, self.model, self.strategy) if folded else []
        return (*site_layouts(nodes, self.model, self.strategy), *twice)

    def _block(self, name: str) -> Block:
        """A site's layouts; on a large mesh those that may matter, which are worked out once for sites that are alike.

        Alike are sites with the same devices and the same network inside.
        """
        folded = name == self.picture.origin and self.constraints.private
        if not self.large or self.constraints.forced or folded:
            return self._site(name)
        nodes = self.picture.nodes[name]
        alike = tuple((node.speed, node.flops, node.usable_bytes, node.pace) for node in nodes)
        key = (alike, self.picture.path(name, name))
        if key not in self._few:
            place = {node.key: index for index, node in enumerate(nodes)}
            few = self._fewer(nodes, self._site(name))
            self._few[key] = [([[place[n.key] for n in island] for island in x.islands], x.widest) for x in few]
        return tuple(
            Layout(tuple(tuple(nodes[index] for index in island) for island in islands), widest)
            for islands, widest in self._few[key]
        )

    def _fewer(self, nodes: Sequence[Node], block: Block) -> Block:
        """The fastest layout, the roomiest, the fastest of the roomy ones, and those that an answer must speak of."""
        if len(block) <= KEPT_LAYOUTS:
            return block
        figures = [(*self._roughly(layout), index) for index, layout in enumerate(block)]
        able = [entry for entry in figures if entry[0]] or figures
        most = max(layers for layers, _, _ in able)
        kept = {index for index, layout in enumerate(block) if layout.widest}
        kept.add(min((index for index, layout in enumerate(block) if layout.alone), default=0))
        kept.add(min(able, key=lambda entry: (entry[1], entry[2]))[2])
        kept.add(min(able, key=lambda entry: (-entry[0], entry[1], entry[2]))[2])
        for part in (0.9, 0.75, 0.5):
            roomy = [entry for entry in able if entry[0] >= part * most]
            kept.add(min(roomy, key=lambda entry: (entry[1], entry[2]))[2])
        alone = [all(len(island) == 1 for island in layout.islands) for layout in block]
        kept.update(i for i, layout in enumerate(block) if alone[i] and len(layout.islands) == len(nodes))
        return tuple(block[index] for index in sorted(kept))

    def _roughly(self, layout: Layout) -> tuple[int, float]:
        """Layers that fit, and mean seconds of one where all is full, as if islands could be cut anywhere."""
        layers, total_s = 0, 0.0
        for island in layout.islands:
            held, layer_s = self.assembler.roughly(island)
            layers += held
            total_s += held * layer_s
        return layers, total_s / layers if layers else math.inf

    def _holds(self, name: str) -> int:
        """What a site can take of the model: bytes; on a large mesh layers, for whole layers fill memory badly."""
        if not self.large:
            return sum(node.usable_bytes for node in self.picture.nodes[name])
        return max((self._layers(layout) for layout in self._layouts[name]), default=0)

    def _layers(self, layout: Layout) -> int:
        fits = [self.assembler.middle(island) for island in layout.islands]
        return sum(each.capacity for each in fits if each is not None) if all(fits) else 0

    def _near(self) -> dict[frozenset[str], Block]:
        if self.strategy == "pipeline":
            return {}
        if self.constraints.forced:
            forced = forced_clusters(self.picture, self.model, self.constraints)
            return {names: tuple(layouts) for names, layouts in forced.items()}
        near = clusters(self.picture, self.model)
        found = {g: tuple(cluster_layouts([self.picture.nodes[n] for n in sorted(g)], self.model)) for g in near}
        return {group: block for group, block in found.items() if block}

    @staticmethod
    def _only(block: Block, *, widest: bool) -> Block:
        """The widest tensor-parallel layout where the site has one, else its single devices; or always the latter."""
        wide = tuple(layout for layout in block if layout.widest and not layout.alone)
        return wide if widest and wide else tuple(layout for layout in block if layout.alone)

    def _singly(self, names: frozenset[str]) -> list[Block]:
        return [self._layouts[name] for name in sorted(names)]

    def _partitions(self, names: frozenset[str]) -> Iterator[list[Block]]:
        """Every way to group the sites into clusters and single sites."""
        if not names:
            yield []
            return
        first = min(names)
        for rest in self._partitions(names - {first}):
            yield [self._layouts[first], *rest]
        for group, block in self._clusters.items():
            if first in group and group <= names:
                for rest in self._partitions(names - group):
                    yield [block, *rest]

    def _most_sites(self) -> int:
        most = len(self.picture.sites)
        if self.constraints.max_sites is not None:
            most = min(most, self.constraints.max_sites)
        return most if self._clusters else min(most, self.constraints.stages or self.model.layers)

    def _sets(self, size: int, best: Candidate | None) -> Iterator[frozenset[str]]:
        """Sets of sites that have the memory, and might be faster than what is found where only speed counts."""
        least = self._needed
        roomiest = sorted(self._room.values(), reverse=True)
        if sum(roomiest[:size]) < least:
            return
        if math.comb(len(self.picture.sites), size) <= LISTED_SETS:
            for names in itertools.combinations(self.picture.sites, size):
                fits = sum(self._room[name] for name in names) >= least
                if fits and not self._hopeless(frozenset(names), best):
                    yield frozenset(names)
            return
        yield from (names for names in self._grown(size, roomiest) if not self._hopeless(names, best))

    def _hopeless(self, names: frozenset[str], best: Candidate | None) -> bool:
        """Whether a lower bound on the latency of these sites is above what is found already."""
        if best is None or self.constraints.wish != "latency":
            return False
        blocks = [group for group in self._clusters if group <= names] + [frozenset([name]) for name in names]
        speed = max(sum(node.speed for name in group for node in self.picture.nodes[name]) for group in blocks)
        bound_s = self.model.layers * (self.model.layer_bytes - 2 * self.model.row_bytes) / speed
        if len(names) > 1 and not any(group <= names for group in self._clusters):
            bound_s += sum(min(self.picture.path(a, b).one_way_s for b in names if b != a) for a in names)
        return bound_s > best.token_s

    def _grown(self, size: int, roomiest: Sequence[int]) -> Iterator[frozenset[str]]:
        """From every site the set that stays nearest and can still hold the model; then swaps around the best set."""
        seen: set[frozenset[str]] = set()
        for start in self.picture.sites:
            names = self._grow(start, size, roomiest)
            if names is not None and names not in seen:
                seen.add(names)
                yield names
        wish = self.constraints.wish
        while not self.exhausted:
            done = [(c.cost(wish), names) for names in seen if (c := self._found.get(names)) is not None]
            if not done:
                return
            centre = min(done, key=lambda entry: entry[0])[1]
            swaps = [
                centre - {out} | {into} for out in sorted(centre) for into in self.picture.sites if into not in centre
            ]
            fresh = [names for names in swaps if names not in seen]
            if not fresh:
                return
            for names in fresh:
                seen.add(names)
                if sum(self._room[name] for name in names) >= self._needed:
                    yield names

    def _grow(self, start: str, size: int, roomiest: Sequence[int]) -> frozenset[str] | None:
        names = [start]
        far = {s: self.picture.path(start, s).one_way_s for s in self.picture.sites if s != start}
        room = self._room[start]
        while len(names) < size:
            rest = sum(roomiest[: size - len(names) - 1])
            can = [s for s in far if self._room[s] + rest >= self._needed - room]
            if not can:
                return None
            nearest = min(can, key=lambda s: (far[s], s))
            names.append(nearest)
            room += self._room[nearest]
            del far[nearest]
            far = {s: min(way_s, self.picture.path(nearest, s).one_way_s) for s, way_s in far.items()}
        return frozenset(names)
