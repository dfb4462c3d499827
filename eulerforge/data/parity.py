"""The gate between training and inference: what the model is trained on is what it will be asked, token by token.

Checked on the template: it puts one BOS before a conversation, and a header before an answer where it is asked for one.
Checked on rows spread over the data: the prompt that inference renders is a token prefix of the training row and the
training begins right behind it; the token that ends an answer is trained.
Checked on every row, while it was tokenized (``findings``): special tokens out of place, answers that are cut.
What is found is named after its usual cause: a double BOS, pad = eos, a missing generation marker, a lost answer, a cut
answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from eulerforge.data.files import find_files
from eulerforge.data.findings import special_ids, too_many
from eulerforge.data.prepared import Datasets
from eulerforge.data.prompt import render_prompt
from eulerforge.data.read import BadRows, SourceRow, read_rows, rows_before
from eulerforge.data.render import Renderer
from eulerforge.data.rows import ChatRow, RowParser
from eulerforge.data.tokenize import RowTokenizer
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.data.turns import Message
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from eulerforge.config.schema import DataConfig

LOOKED_AT = 64
"""Rows of which the tokens are looked at."""
ASKED = 3
"""Rows whose prompt is rendered again from their line."""
_READ_AGAIN = 10_000
_ARRAY_READ_AGAIN = 16 * 2**20
"""Rows of a file, and bytes of a JSON array, that are read once more to find one row: more would take longer than it
tells."""
_QUESTION, _ANSWER = "question of parity", "answer of parity"


@attrs.frozen(kw_only=True)
class Parity:
    """``prompts`` rows were rendered again and ``rows`` looked at; of ``whole`` uncut ones ``stopped`` train a stop."""

    prompts: int
    rows: int
    whole: int
    stopped: int
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        return (
            f"parity: {self.prompts} prompts as inference renders them are token prefixes of their rows;"
            f" of {self.whole} whole rows {self.stopped} train their stop token"
        )


def check_parity(datasets: Datasets, config: DataConfig, tokenizer: Any) -> Parity:
    """Look at the rows.

    Raises:
        DataError: it names the row and the cause.
    """
    rows = datasets.train
    if config.format != "processed":
        _refuse_missing_marker(config, tokenizer)
        if config.max_stray_specials < 1:
            _refuse_bos_of_the_template(config, tokenizer)
    places = [int(place) for place in np.unique(np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int))]
    special = special_ids(tokenizer)
    whole = stopped = 0
    for place in places:
        ids, labelled = rows.row(place)
        if len(ids) >= config.max_length:
            continue  # cut off, which was counted
        whole += 1
        _refuse_masked_stop(ids, labelled, tokenizer, rows.source(place))
        stopped += int(ids[np.flatnonzero(labelled)[-1]]) in special
    _refuse_too_many(datasets, config)  # behind pad = eos, which is one way to lose the stop
    prompts = 0
    for place, row in _lines_of(rows, places[:ASKED], config):
        prompts += _refuse_other_prompt(rows, place, row, config, tokenizer)
    warnings: tuple[str, ...] = ()
    if whole and stopped < whole:
        warnings = (
            f"cut answers: {whole - stopped} of {whole} rows looked at do not train a token that ends the answer;"
            " the model may not learn to stop",
        )
    return Parity(prompts=prompts, rows=len(places), whole=whole, stopped=stopped, warnings=warnings)


def _refuse_too_many(datasets: Datasets, config: DataConfig) -> None:
    """Cut answers and special tokens out of place, beyond the shares that the preset allows."""
    problems = [
        problem
        for part in datasets.report.parts
        for problem in too_many(
            part.findings,
            part.rows_usable,
            longest=part.longest,
            max_length=config.max_length,
            cut=config.max_cut_answers,
            stray=config.max_stray_specials,
        )
    ]
    if problems:
        raise DataError.of(problems)


def _refuse_bos_of_the_template(config: DataConfig, tokenizer: Any) -> None:
    """A template that doubles the BOS, or puts one before an answer too; and a system prompt that holds a token."""
    renderer = Renderer(config, tokenizer)
    if not renderer.uses_template:
        return
    if config.system_prompt and renderer.holds_special([Message("system", config.system_prompt)]):
        raise DataError(
            "the text of a special token is written out in it, and would be read as that token",
            key="data.system_prompt",
            hint="take it out: the chat template puts its own; data.max_stray_specials=1 trains on it",
        )
    bos = tokenizer.bos_token_id
    try:
        asked = renderer.prompt([Message("user", _QUESTION)], "")
        again = [Message("user", _QUESTION), Message("assistant", _ANSWER), Message("user", _QUESTION)]
        turns = renderer.prompt(again, "")
    except Exception:  # noqa: BLE001 - a template may raise anything; its rows say what is wrong, one by one
        return
    encode = RowTokenizer(tokenizer).prompt
    first, more = encode(asked), encode(turns)
    if bos is None or bos == tokenizer.eos_token_id:
        wrong = bos is not None and first[:2] == [bos, bos]
    else:
        # behind an EOS it begins a sequence or a turn of its own, as in Llama 2's and SmolLM2's templates
        wrong = any(
            tokenizer.eos_token_id not in ids[begun:index]
            for ids in (first, more)
            for begun, index in pairwise([0, *(place for place, token in enumerate(ids) if token == bos and place)])
        )
    if wrong:
        where = "twice in front" if first[:2] == [bos, bos] else "before more turns than the first"
        raise DataError(
            f"double BOS: the chat template puts {tokenizer.bos_token} {where}",
            key="data.template",
            hint="mend the chat template, or --set data.template=none; data.max_stray_specials=1 trains on it as it is",
        )


def _refuse_masked_stop(ids: np.ndarray[Any, Any], labelled: np.ndarray[Any, Any], tokenizer: Any, source: str) -> None:
    """pad = eos: a tool that masks padding by its id masks the stop token with it."""
    eos = tokenizer.eos_token_id
    if eos is not None and len(ids) > 1 and ids[-1] == eos and not labelled[-1] and labelled[-2]:
        raise DataError(
            f"pad = eos: the row ends in {tokenizer.eos_token}, which is masked: the model would never learn to stop",
            source=source,
            hint="a tool that masks by the padding token's id masks the end of text with it: label the last one",
        )


def _refuse_missing_marker(config: DataConfig, tokenizer: Any) -> None:
    """A template that ignores add_generation_prompt, though its answers begin with a header, or leaves a turn out."""
    renderer = Renderer(config, tokenizer)
    if not renderer.uses_template:
        return
    turns = [Message("user", _QUESTION).to_template(), Message("assistant", _ANSWER).to_template()]
    try:
        asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        plain = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=False))
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template may raise anything; its rows say what is wrong, one by one
        return
    for what, content in (("question", _QUESTION), ("answer", _ANSWER)):
        if content not in text:
            raise DataError(
                f"lost {what}: the chat template does not write what the {turns[what == 'answer']['role']} says",
                key="data.template",
                hint="mend the chat template (it may know the role by another name), or --set data.template=none",
            )
    header, found, _ = text.removeprefix(asked).partition(_ANSWER)
    if asked == plain and text.startswith(asked) and found and header.strip():
        raise DataError(
            f"missing generation marker: the chat template puts {header!r} before an answer, and not where it is asked"
            " for one (add_generation_prompt): the model would be trained to write it",
            key="data.template",
            hint="mend the chat template, or --set data.template=none",
        )


def _refuse_other_prompt(rows: TokenizedRows, place: int, row: SourceRow, config: DataConfig, tokenizer: Any) -> bool:
    """Whether the row's prompt was compared; rows without turns have none."""
    parsed = RowParser(config.schema).parse(row, BadRows())
    if not isinstance(parsed, ChatRow) or parsed.messages[-1].role != "assistant":
        return False
    ids, labelled = rows.row(place)
    prompt = np.array(render_prompt(tokenizer, config, row.data), dtype=ids.dtype)
    common = min(len(prompt), len(ids))
    if not np.array_equal(prompt[:common], ids[:common]):
        at = int(np.argmin(prompt[:common] == ids[:common]))
        raise DataError(
            f"the prompt that inference renders is no token prefix of the row: they part at token {at},"
            f" {tokenizer.decode([int(prompt[at])])!r} and {tokenizer.decode([int(ids[at])])!r}",
            source=rows.source(place),
            key="data.template",
            hint="--set data.template=none trains on plain text",
        )
    behind = max(1, len(prompt))  # the first token of a row has nothing that it could be learned from
    if behind < len(ids) and not labelled[behind]:
        raise DataError(
            "the first token after the prompt that inference renders is not trained",
            source=rows.source(place),
            key="data.template",
            hint="--set data.template=none trains on plain text",
        )
    return True


def _lines_of(rows: TokenizedRows, places: list[int], config: DataConfig) -> Iterator[tuple[int, SourceRow]]:
    """(index, its row read again)."""
    if config.format == "processed":
        return
    for place in places:
        index, origin = rows.origin(place)
        (file,) = find_files([rows.files[index]])
        array = file.path.suffix.lower() == ".json"
        if rows_before(origin) >= _READ_AGAIN or (array and file.path.stat().st_size > _ARRAY_READ_AGAIN):
            continue
        for source in read_rows(file, BadRows()):
            if source.place >= origin:
                if source.place == origin:
                    yield place, source
                break
