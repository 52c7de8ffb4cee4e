"""What is given in the wrong type: one clear error, where it enters. What is as good is taken."""

# mypy: disable-error-code="arg-type, call-arg, list-item, dict-item, operator, return-value, misc"

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, logits

from mia.edits import Edit
from mia.errors import MiaError, RangeError, UsageError
from mia.request import Capture, Request, Sampling
from mia.sites import Site
from mia.steering import Steering
from mia.vectors import Vector

V = np.random.default_rng(0).standard_normal(48)
IDS = [5, 6, 7, 8]
NAN, INF = float("nan"), float("inf")


def edit(**options: Any) -> Callable[[], object]:
    return lambda: Edit(**{"site": "l_out-1", "op": "add", "value": V, **options})


def heads(**options: Any) -> Callable[[], object]:
    return lambda: Edit(**{"site": "head_out.1", "op": "zero", **options})


def request(**options: Any) -> Callable[[], object]:
    return lambda: Request(**{"tokens": IDS, **options})


def sampling(**options: Any) -> Callable[[], object]:
    return lambda: Sampling(**options)


def steering(**options: Any) -> Callable[[], object]:
    return lambda: Steering(**{"vector": Vector({1: V}), **options})


def vector(directions: Any) -> Callable[[], object]:
    return lambda: Vector(directions)


WRONG: list[tuple[Callable[[], object], str]] = [
    (edit(site=3), "site is a name or a Site, not 3"),
    (edit(op=7), "neither an operator's name nor a function: 7"),
    (edit(value="abc"), "value of the edit at l_out-1 is no array of numbers: 'abc'"),
    (edit(value=V * 1j), "numbers are real here, not complex"),
    (edit(value=[[1, 2], [3]]), "no array of numbers"),
    (edit(value={}), "no array of numbers"),
    (edit(value=object()), "no array of numbers"),
    (edit(value=10**400 * np.ones(2, object)), "no array of numbers"),
    (edit(value=V * 1e300), "not finite"),
    (edit(tokens=1.0), r"tokens of the edit at l_out-1 is an index, several, .*, not 1\.0"),
    (edit(tokens="1"), "not '1'"),
    (edit(tokens=True), "not True"),
    (edit(tokens=[0, 1.0]), r"each of tokens .* is a whole number, not 1\.0"),
    (edit(tokens=[0, False]), "not False"),
    (edit(tokens=np.array([1.5])), "whole numbers, not"),
    (edit(tokens=np.array([True, False])), "whole numbers, not"),
    (edit(tokens=np.array([[1]])), "whole numbers|whole number"),
    (edit(tokens={1, 2}), r"several, a slice or None, not \{1, 2\}"),
    (edit(tokens=iter([1])), "several, a slice or None"),
    (edit(tokens=slice(0.5, None)), "each end of tokens"),
    (edit(tokens=slice(None, None, 0)), "step of 0"),
    (edit(generated=[2]), r"generated .* is True or False, not \[2\]"),
    (edit(generated=1), "generated .* is True or False, not 1"),
    (edit(keep_norm="yes"), "keep_norm .* is True or False, not 'yes'"),
    (edit(coeff="2"), "coefficient is a number, not '2'"),
    (edit(coeff=True), "coefficient is a number, not True"),
    (edit(coeff=1j), "coefficient is a number, not 1j"),
    (edit(coeff=NAN), "coefficient nan is not a finite number"),
    (edit(coeff=1e39), r"coefficient 1e\+39 is not a finite number"),
    (edit(coeff=["a"]), "coefficient is no array of numbers"),
    (edit(coeff=None), "coefficient is a number, not None"),
    (edit(dims=[1.0]), "each of dims"),
    (edit(dims=[3, 3]), "dims of the edit at l_out-1 has 3 twice"),
    (heads(heads=[1.5]), r"each of heads of the edit at head_out.1 is a whole number, not 1\.5"),
    (heads(heads=1.5), "heads .* is a whole number, not 1.5"),
    (heads(heads=True), "not True"),
    (heads(heads="1"), "not '1'"),
    (heads(heads=[2, 0, 2]), "heads of the edit at head_out.1 has 2 twice"),
    (heads(heads=np.array([0.0])), "whole number"),
    (lambda: Capture(3), "sites are names or Sites, not 3"),
    (lambda: Capture([3]), "sites are names or Sites, not 3"),
    (lambda: Capture("l_out", 1.0), "tokens of a capture"),
    (lambda: Capture("l_out", None, 1), "generated of a capture"),
    (request(tokens=5), "tokens are whole numbers"),
    (request(tokens="Hello"), "not a text"),
    (request(tokens=[1.0]), "tokens are whole numbers"),
    (request(tokens=[True]), "tokens are whole numbers"),
    (request(tokens=[[5, 6]]), "tokens are whole numbers"),
    (request(tokens=np.array([[5, 6]])), "tokens are whole numbers"),
    (request(tokens=np.array([5.0])), "tokens are whole numbers"),
    (request(tokens=None), "tokens are whole numbers"),
    (request(tokens=iter(IDS)), "tokens are whole numbers"),
    (request(tokens=[]), "the prompt is empty"),
    (request(edits=3), "3 is no Edit, nor several"),
    (request(edits=[Capture("l_out")]), "is not of type Edit"),
    (request(captures="l_out"), "'l' is not of type Capture"),
    (request(captures=[None]), "None is not of type Capture"),
    (request(logits=1.0), "logits is an index"),
    (request(logits="first"), "logits is 'first'"),
    (request(logits=True), "logits is an index"),
    (request(metric=len, logits=None), "a metric needs logits, and logits is None"),
    (request(metric=3), "a metric is a function of logits, not 3"),
    (request(n_predict=1.0), r"n_predict is a whole number, not 1\.0"),
    (request(n_predict=True), "n_predict is a whole number, not True"),
    (request(n_predict=-1), "n_predict -1 is negative"),
    (request(sampling=0.7), r"sampling is a Sampling, not 0\.7"),
    (request(stop_at_eog=0), "stop_at_eog is True or False, not 0"),
    (request(logprobs=None), "logprobs is True or False, not None"),
    *[
        (sampling(**{name: bad}), name.replace("_", "."))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repeat_penalty",
            "frequency_penalty",
            "presence_penalty",
        )
        for bad in (NAN, INF, -INF, "1", None, True, 1j)
    ],
    (sampling(frequency_penalty=1e30), "frequency penalty 1e.30 is too large"),
    (sampling(repeat_penalty=1e30), "repeat penalty 1e.30 is too large"),
    (sampling(repeat_penalty=1e-30), "repeat penalty 1e-30 is not positive"),
    (sampling(temperature=1e-30), "temperature 1e-30 is not in"),
    (sampling(temperature=1e30), "temperature 1e.30 is not in"),
    (sampling(temperature=-1), r"temperature -1\.0 is negative"),
    (sampling(seed=1.5), r"seed is a whole number, not 1\.5"),
    (sampling(seed=True), "seed is a whole number"),
    (sampling(seed=2**32), "seed 4294967296 is not in 0 to"),
    (sampling(top_k=1.0), "top-k is a whole number"),
    (sampling(top_k=2**31), "top-k 2147483648 is more than 2147483647"),
    (steering(vector=V), "vector is a Vector"),
    (steering(op=3), "neither an operator's name nor a function: 3"),
    (steering(coeff="4"), "coefficient is a number, not '4'"),
    (steering(coeff=NAN), "coefficient nan is not a finite number"),
    (steering(layers=[1.0]), "layers of a Steering"),
    (steering(layers="1"), "layers of a Steering"),
    (steering(tokens=1.5), "tokens of a Steering"),
    (steering(generated=[1]), "generated of a Steering"),
    (steering(keep_norm=1), "keep_norm of a Steering"),
    (vector([V]), "directions are .layer: row."),
    (vector({"1": V}), "a vector's layer is a whole number, not '1'"),
    (vector({1.5: V}), r"a vector's layer is a whole number, not 1\.5"),
    (vector({-1: V}), "there is no layer -1"),
    (vector({1: "abc"}), "direction of layer 1 is no array of numbers"),
    (vector({1: V * 1j}), "real here, not complex"),
    (lambda: Vector({1: V}) * NAN, "factor nan is not a finite number"),
    (lambda: Vector({1: V}) * "2", "factor is a number, not '2'"),
    (lambda: Vector({1: V}) / True, "divisor is a number, not True"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_types_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_fields_after_the_tokens_have_names() -> None:
    with pytest.raises(TypeError):
        Edit("head_out.1", "zero", None, -1, [2])


RUN_WRONG: list[tuple[Callable[[Any], object], str]] = [
    (
        lambda m: m.run([Request(IDS, metric=len, logits=slice(9, None))]),
        "a metric needs logits, and logits selects none of 4 tokens",
    ),
    (lambda m: m.run([IDS]), r"\[5, 6, 7, 8\] is not of type Request"),
    (lambda m: m.run(IDS), "5 is not of type Request"),
    (lambda m: m.run(5), "5 is no Request, nor several"),
    (lambda m: m.run("text"), "'t' is not of type Request"),
    (lambda m: m.run(None), "None is no Request"),
    (lambda m: m.run(Request(IDS)), "run takes a list"),
    (lambda m: m.tokenize(["a"]), r"tokenize takes a text, not \['a'\]"),
    (lambda m: m.tokenize(None), "tokenize takes a text, not None"),
    (lambda m: m.tokenize(b"a"), "tokenize takes a text"),
    (lambda m: m.ids([5.7]), r"whole number, not 5\.7"),
    (lambda m: m.ids(5), "whole numbers, not 5"),
    (lambda m: m.look([5.7]), r"whole number, not 5\.7"),
    (lambda m: m.look(IDS, 3), "sites are names"),
    (lambda m: m.generate(IDS, 1.5), "n_predict is a whole number"),
    (lambda m: m.generate(IDS, edits="zero"), "'z' is not of type Edit"),
    (lambda m: m.detokenize([1.5]), "a token id is a whole number"),
    (lambda m: m.piece("a"), "a token id is a whole number"),
    (
        lambda m: m.run([Request(IDS, captures=[Capture(Site("q", 1.5))])]),
        "layer 1.5 is not a whole",
    ),
    (
        lambda m: m.run([Request(IDS, captures=[Capture(Site("q", "1"))])]),
        "layer '1' is not a whole",
    ),
    (
        lambda m: m.run([Request(IDS, Edit("l_out-1", "add", V, [1, 1]))]),
        "the edit at l_out-1 selects token 1 twice",
    ),
    (
        lambda m: m.run([Request(IDS, Edit("l_out-1", "add", V, [3, -1]))]),
        "the edit at l_out-1 selects token 3 twice",
    ),
    *[
        (
            lambda m, bad=bad: m.run([Request(IDS, Edit("l_out-1", lambda h: bad))]),
            "function at l_out-1 made|the function at l_out-1",
        )
        for bad in (None, "abc", 1j, [1, [2]], object(), {})
    ],
    (
        lambda m: m.run([Request(IDS, Edit("l_out-1", lambda h: h * 1j))]),
        "what the function at l_out-1 made: numbers are real here, not complex",
    ),
]


@pytest.mark.parametrize(("act", "message"), RUN_WRONG, ids=[str(i) for i in range(len(RUN_WRONG))])
def test_wrong_arguments_of_a_model_are_named(
    llama: Tiny, act: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(MiaError, match=message):
        act(llama.model)


def test_what_is_as_good_is_taken(llama: Tiny) -> None:
    """Numpy's numbers and arrays, ranges, generators, one for a list of one."""
    base = Edit("head_out.1", "zero", tokens=[1, 2], heads=[1])
    want = logits(llama.model.run([Request(IDS, [base])])[0])
    for tokens in ((1, 2), range(1, 3), np.array([1, 2]), [np.int32(1), 2], slice(1, np.int64(3))):
        for head in ([1], 1, np.uint8(1), (1,), range(1, 2), np.array([1])):
            e = Edit("head_out.1", "zero", None, tokens, heads=head)
            requests = (Request(np.array(IDS), e) for _ in range(1))
            got = llama.model.run(requests)[0]
            np.testing.assert_array_equal(logits(got), want)
    several = Request(IDS, (e for e in [base]), (Capture(s) for s in ("l_out", "q")))
    for _ in range(2):
        result = llama.model.run([several])[0]
        np.testing.assert_allclose(logits(result), want, atol=1e-5)
        assert len(result.captures) == 6
    one = Edit("l_out-1", "scale", coeff=np.float16(2), dims=3, tokens=np.int64(0))
    two = Edit("l_out-1", "scale", coeff=2, dims=[3], tokens=[0])
    a, b = llama.model.run([Request(IDS, one), Request(IDS, two)])
    np.testing.assert_array_equal(logits(a), logits(b))
    fine = Sampling(temperature=np.float32(1), top_k=np.int64(4), seed=np.uint32(7))
    same = Sampling(temperature=1, top_k=4, seed=7)
    a, b = (
        llama.model.run([Request(IDS, n_predict=n, sampling=s, stop_at_eog=np.bool_(False))])[0]
        for n, s in ((np.int16(5), fine), (5, same))
    )
    assert a.tokens == b.tokens and len(a.tokens) == 5
    Vector({np.int64(1): [1, 2, 3]}) * np.float64(2)
    with pytest.raises(RangeError, match="head 6 is out of range"):
        llama.model.run([Request(IDS, Edit("head_out.1", "zero", heads=6))])


def test_a_value_is_not_changed_afterwards(llama: Tiny) -> None:
    """A buffer that is filled anew for each edit must not make all of them the last."""
    buffer, edits, vectors = np.zeros(48, np.float32), [], []
    for i in range(3):
        buffer[:] = V * i
        edits.append(Edit("l_out-1", "add", buffer, tokens=-1))
        vectors.append(Vector({1: buffer}))
    buffer[:] = 7
    got = llama.model.run([Request(IDS, e) for e in edits])
    fresh = llama.model.run([Request(IDS, Edit("l_out-1", "add", V * i, -1)) for i in range(3)])
    for a, b, i in zip(got, fresh, range(3), strict=True):
        np.testing.assert_array_equal(logits(a), logits(b))
        np.testing.assert_allclose(vectors[i][1], V * i, rtol=1e-6)
