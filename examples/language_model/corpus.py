"""From the State of the Union addresses to batches of token ids."""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import re
import zipfile

import numpy as np
import tiktoken

from .failures import Failure, reason
from .options import Options

SPEECH_HEADER = re.compile(r"^== (\d{4}) \| .+? \| .+?\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of the two splits and what is needed to read them back."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: tiktoken.Encoding
    digest: str  # of everything that the ids depend on

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.n_vocab


def load(options: Options) -> Corpus:
    """Reads, tokenises (once; the ids are cached) and splits the corpus by year."""
    text_bytes, vocabulary_bytes = map(_read, (options.corpus, options.vocabulary))
    tokenizer = _tokenizer(vocabulary_bytes, options)
    digest = hashlib.sha256()
    for part in (
        text_bytes,
        vocabulary_bytes,
        f"{tokenizer.n_vocab} {tiktoken.__version__} layout 1".encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    ids, years, starts = _cached_ids(
        options.cache / f"tokens-{digest.hexdigest()[:16]}.npz",
        lambda: _tokenise(text_bytes, tokenizer, options.corpus),
    )
    splits = []
    for name, (first, last) in (
        ("--train-years", options.train_years),
        ("--held-out-years", options.held_out_years),
    ):
        chosen = [
            ids[a:b]
            for (a, b), year in zip(itertools.pairwise(starts), years, strict=True)
            if first <= year <= last
        ]
        if sum(map(len, chosen)) <= options.context:
            raise Failure(
                f"{name} {first}-{last} selects {sum(map(len, chosen))} tokens, fewer "
                f"than one sequence of {options.context + 1}; the corpus spans "
                f"{years.min()}-{years.max()}."
            )
        splits.append(np.concatenate(chosen))
    train, held_out = splits
    return Corpus(train, held_out, tokenizer, digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class Batches:
    """Shuffled batches as a function of how many came before: nothing to save.

    Every epoch visits each window of `context + 1` tokens at most once, in an order
    drawn from `(seed, epoch)`. The position is the whole state of the stream.
    """

    tokens: np.ndarray
    batch: int
    context: int
    seed: int

    def __post_init__(self):
        if len(windows(self.tokens, self.context)) < self.batch:
            raise Failure(
                f"--batch {self.batch} is more than the "
                f"{len(windows(self.tokens, self.context))} sequences of --train-years."
            )

    def at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, each (batch, context), of batch number `position`."""
        every = windows(self.tokens, self.context)
        epoch, index = divmod(position, len(every) // self.batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(every))
        chosen = every[np.sort(order[index * self.batch :][: self.batch])]
        return chosen[:, :-1], chosen[:, 1:]


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Non-overlapping label windows (n, context + 1): each token is a label once."""
    n = (len(tokens) - 1) // context
    starts = context * np.arange(n)[:, None]
    return tokens[starts + np.arange(context + 1)]


def held_out_windows(corpus: Corpus, options: Options) -> np.ndarray:
    """About `evaluation_tokens` in windows spread evenly over the held-out speeches.

    Whole batches only, so that every evaluation runs one compiled program.
    """
    every = windows(corpus.held_out, options.context)
    count = min(len(every), max(1, options.evaluation_tokens // options.context))
    count -= count % options.batch if count > options.batch else 0
    return every[np.linspace(0, len(every) - 1, count).astype(int)]


def unigram_perplexity(corpus: Corpus, labels: np.ndarray, pseudo: float = 0.1):
    """Perplexity of the training frequencies with `pseudo` added to every count.

    A tenth is the best of 0.001, 0.01, 0.03, 0.1, 0.3 and 1 for the demo's split.
    """
    counts = np.bincount(corpus.train, minlength=corpus.vocabulary_size) + pseudo
    return float(np.exp(-np.log(counts[labels] / counts.sum()).mean()))


def _read(path: pathlib.Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error
    except lzma.LZMAError as error:
        raise Failure(f"{path} is not a whole xz file: {error}.") from error


def _tokenizer(vocabulary: bytes, options: Options) -> tiktoken.Encoding:
    # Line 1 is JSON with the split pattern, then one base64 token a line in rank order.
    # A prefix of the ranks is itself a byte-pair encoding: merges only build on earlier
    # ones.
    head, *lines = vocabulary.decode("ascii", "replace").splitlines() or [""]
    try:
        pattern = json.loads(head)["pattern"]
        ranks = {base64.b64decode(t, validate=True): i for i, t in enumerate(lines)}
        if len(ranks) != len(lines) or len(ranks) < 256:
            raise ValueError("tokens are missing or repeated")
        size = options.vocabulary_size or len(ranks)
        if size > len(ranks):
            raise Failure(
                f"--vocabulary-size must be at most {len(ranks):,} for "
                f"{options.vocabulary}, got {size:,}."
            )
        return tiktoken.Encoding(
            "tekken",
            pat_str=pattern,
            mergeable_ranks=dict(itertools.islice(ranks.items(), size)),
            special_tokens={},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(
            f"{options.vocabulary} is not a vocabulary of this format: {error}."
        ) from error


def _tokenise(text: bytes, tokenizer: tiktoken.Encoding, path: pathlib.Path):
    try:
        fields = SPEECH_HEADER.split(text.decode("utf-8"))[1:]
    except UnicodeDecodeError as error:
        raise Failure(f"{path} is not UTF-8 text: {error}.") from error
    years, speeches = fields[::2], fields[1::2]
    if not speeches:
        raise Failure(f"{path} has no speech: no line `== year | president | party`.")
    encoded = tokenizer.encode_ordinary_batch([s.strip() + "\n" for s in speeches])
    starts = np.cumsum([0, *map(len, encoded)])
    return np.concatenate(encoded).astype(np.int32), np.array(years, int), starts


def _cached_ids(path: pathlib.Path, compute):
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["ids"], stored["years"], stored["starts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent or damaged: a cache may always be made again
    ids, years, starts = compute()
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, ids=ids, years=years, starts=starts)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise Failure(
            f"cannot write the token cache {path}: {reason(error)}; --cache chooses "
            "another folder."
        ) from error
    return ids, years, starts
