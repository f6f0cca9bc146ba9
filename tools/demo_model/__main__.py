"""Makes the demo model from nothing: ``python -m tools.demo_model [all|fetch|data|train|evaluate|install]``.

``all`` does every step in order; each leaves its result in the build folder, so that the steps can run
on different machines (fetch and data need Debian's apt or an unpacked copy, train wants a GPU).
"""

import argparse
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.demo_model import conversations, corpus, data, tokenizer, train
from tools.demo_model.conversations import Sources

from penstock.demo import model_path

_ROWS = {"reading": 24000, "talking": 17000}
_SEEDS = {"reading": 1, "talking": 3}
_TOKENIZER_SEED = 2
_TOKENIZER_CONVERSATIONS = 8000
_PAGES = ("chat_template.jinja", "LICENSE-NOTICE.txt")
_MADE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> int:
    """Run the chosen step; 1 if the evaluation doesn't accept the model."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("step", nargs="?", default="all", choices=["all", *_STEPS])
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"), help="where results are left")
    parser.add_argument("--model", type=Path, help="what 'evaluate' looks at; default: the build's model")
    parser.add_argument("--windows", type=int, default=0, help="held-out windows to score; 0: all of them")
    options = parser.parse_args()
    for name in _STEPS if options.step == "all" else [options.step]:
        if not _STEPS[name](options):
            return 1
    return 0


def _fetch(options: argparse.Namespace) -> bool:
    corpus.fetch(options.build / "sources")
    return True


def _data(options: argparse.Namespace) -> bool:
    """The tokenizer and both phases' token arrays."""
    model = options.build / "model"
    model.mkdir(parents=True, exist_ok=True)
    for page in _PAGES:
        shutil.copy(model_path() / page, model / page)
    documents = corpus.read(options.build / "sources")
    print(f"{len(documents)} documents, SHA-256 {corpus.digest(documents)}")
    sources = _sources(options.build)
    texts = _conversations(model, sources, _TOKENIZER_SEED)
    learned = tokenizer.train(
        itertools.chain(
            (d.text for d in sources.documents), itertools.islice(texts, _TOKENIZER_CONVERSATIONS)
        )
    )
    tokenizer.save(learned, model)
    docs = data.stream_ids(learned, sources.documents)
    held_out = data.stream_ids(learned, [d for d in documents if d.held_out])
    for phase, rows in _ROWS.items():
        texts = _conversations(model, sources, _SEEDS[phase])
        ids, spoken = data.pack(learned, texts, rows, train.READING.length)
        data.save(options.build / f"{phase}.npz", docs=docs, held_out=held_out, ids=ids, spoken=spoken)
        print(f"{phase}: {len(docs):,} tokens to read, {ids.size:,} of talk, {spoken.mean():.0%} spoken")
    return True


def _train(options: argparse.Namespace) -> bool:
    model, first = options.build / "model", options.build / "reading"
    first.mkdir(exist_ok=True)
    train.run(options.build / "reading.npz", first, train.READING)
    train.run(options.build / "talking.npz", model, train.TALKING, start=first)
    return True


def _evaluate(options: argparse.Namespace) -> bool:
    from tools.demo_model import evaluate

    documents = corpus.read(options.build / "sources")
    folder = options.model or options.build / "model"
    held_out = [d for d in documents if d.held_out]
    return evaluate.accepted(evaluate.figures(folder, _sources(options.build), held_out, options.windows))


def _install(options: argparse.Namespace) -> bool:
    for name in _MADE:
        shutil.copy(options.build / "model" / name, model_path() / name)
    return True


def _sources(build: Path) -> Sources:
    folder = build / "sources"
    documents = [d for d in corpus.read(folder) if not d.held_out]
    return Sources(documents, corpus.definitions(folder))


def _conversations(model: Path, sources: Sources, seed: int) -> Iterator[str]:
    renderer = conversations.Renderer(model / "chat_template.jinja")
    return (renderer.whole(c) for c in conversations.stream(seed, sources))


_STEPS = {"fetch": _fetch, "data": _data, "train": _train, "evaluate": _evaluate, "install": _install}

if __name__ == "__main__":
    raise SystemExit(main())
