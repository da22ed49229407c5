"""Explained inputs, bound arguments, and where the inputs enter the model."""

import copy
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError, ModelError, OutputError
from tests.helpers import additivity_error, assert_same_state, explain, state_of

EXACT = 1e-13
PAD, MASK = 0, 1


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def built(model: nn.Module) -> nn.Module:
    model.double().eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=seed))
    return model


class Encoder(nn.Module):
    """A transformer layer over tokens, the mean of those that are not padding, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.mixer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = ids != PAD if mask is None else mask.bool()
        h = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        h = self.mixer(h, src_key_padding_mask=~seen)
        return self.head((h * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))


IDS = torch.tensor([[5, 9, 3, 7, 2, 4], [8, 2, 6, PAD, PAD, PAD], [10, 3, 3, 5, PAD, PAD]])
SEEN = (IDS != PAD).long()
MASKED = torch.where(IDS == PAD, PAD, MASK)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return built(Encoder())


@pytest.fixture(scope="module")
def cut(encoder) -> tuple[Any, nn.Module]:
    return fxshap.make_explainable(encoder).split_at("norm")


# --- from embeddings ----------------------------------------------------------------------------


def test_sentences_of_several_lengths_are_explained_from_their_embeddings(encoder, cut):
    embed, head = cut
    before = state_of(encoder)
    x, r = embed(IDS, mask=SEEN), embed(MASKED, mask=SEEN)
    assert x.shape == (3, 6, 8) and not x.requires_grad
    with torch.no_grad():
        assert torch.equal(head.bind(ids=IDS, mask=SEEN)(x), encoder(IDS, SEEN))
    for row in range(3):
        one = slice(row, row + 1)
        model = head.bind(ids=IDS[one], mask=SEEN[one])
        (values,) = explain(model, [r[one]], [x[one]])
        with torch.no_grad():
            change = encoder(IDS[one], SEEN[one]) - encoder(MASKED[one], SEEN[one])
        np.testing.assert_allclose(values.sum((1, 2)), change, rtol=0, atol=EXACT)
        padding = SEEN[row] == 0
        assert not values[0, padding].any() and values[0, ~padding].any((1, 2)).all()
    assert len(head._calls.captures.engines) == 1  # one capture for all
    assert_same_state(encoder, before)


def test_one_explainer_serves_samples_of_one_mask(encoder, cut):
    embed, head = cut
    full, references = IDS[:1].roll(1, 1), IDS[:1].repeat(5, 1).cumsum(0) % 9 + 2
    samples = torch.cat([full, full.flip(1)])
    (values,) = explain(
        head.bind(ids=full, mask=torch.ones(1, 6)), [embed(references)], [embed(samples)]
    )
    with torch.no_grad():
        change = encoder(samples) - encoder(references).mean(0)
    np.testing.assert_allclose(values.sum((1, 2)), change, rtol=0, atol=EXACT)


def test_captum_takes_all_sentences_at_once(encoder, cut):
    embed, head = cut
    x, r = embed(IDS, mask=SEEN), embed(MASKED, mask=SEEN)
    found, delta = ca.DeepLift(head.bind(ids=IDS, mask=SEEN)).attribute(
        x, r, target=1, return_convergence_delta=True
    )
    assert delta.abs().max() <= EXACT
    for row in range(3):
        one = slice(row, row + 1)
        model = head.bind(ids=IDS[one], mask=SEEN[one])
        (values,) = explain(model, [r[one]], [x[one]])
        np.testing.assert_allclose(found[one].detach(), values[..., 1], rtol=1e-12, atol=1e-14)


def test_what_the_model_derives_from_bound_ids_belongs_to_the_sample(encoder, cut):
    """Without a mask the model makes its own, from the ids that are bound."""
    embed, head = cut
    one = slice(1, 2)
    (values,) = explain(head.bind(ids=IDS[one]), [embed(MASKED[one])], [embed(IDS[one])])
    masked = head.bind(ids=IDS[one], mask=SEEN[one])
    (expected,) = explain(masked, [embed(MASKED[one])], [embed(IDS[one])])
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14)


def test_the_layer_may_be_named_at_once_or_be_the_module_itself(encoder, cut):
    head = fxshap.make_explainable(encoder, layer=encoder.tokens, forward_kwargs={"mask": SEEN[:1]})
    x = head.prefix(IDS[:1])
    assert torch.equal(x, encoder.tokens(IDS[:1]).detach())
    head = head.bind(ids=IDS[:1])
    (values,) = explain(head, [head.prefix(MASKED[:1])], [x])
    with torch.no_grad():
        change = encoder(IDS[:1]) - encoder(MASKED[:1])
    np.testing.assert_allclose(values.sum((1, 2)), change, rtol=0, atol=EXACT)


def test_refined_values_from_embeddings_add_up(encoder):
    embed, head = fxshap.make_explainable(
        encoder, refine=fxshap.Refinement(2, feature_dims=(1,))
    ).split_at("norm")
    one = slice(1, 2)
    model = head.bind(ids=IDS[one], mask=SEEN[one])
    (values,) = explain(model, [embed(MASKED[one], SEEN[one])], [embed(IDS[one], SEEN[one])])
    with torch.no_grad():
        change = encoder(IDS[one], SEEN[one]) - encoder(MASKED[one], SEEN[one])
    np.testing.assert_allclose(values.sum((1, 2)), change, rtol=0, atol=EXACT)


def test_a_model_may_begin_with_what_enters_a_layer():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.join = nn.Linear(3, 4), nn.Linear(3, 4), nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.join(self.a(x).exp(), input2=self.b(x)))

    model = built(Pair())
    embed, head = fxshap.make_explainable(model).split_at("join", side="input")
    references, samples = normal(5, 3, seed=1) / 3, normal(2, 3, seed=2) / 3
    background, passing = embed(references), embed(samples)
    head = head.bind(x=references[:1])
    values = explain(head, background, passing)
    with torch.no_grad():
        change = model(samples) - model(references).mean(0)
    total = sum(phi.sum(1) for phi in values)
    assert len(values) == 2
    np.testing.assert_allclose(total, change, rtol=0, atol=EXACT)


def test_errors_of_explaining_from_a_layer(encoder, cut):
    embed, head = cut
    explainable = fxshap.make_explainable(encoder)
    with pytest.raises(InputError, match="has no module 'token'; is it one of .*tokens"):
        explainable.split_at("token")
    with pytest.raises(ModelError, match="split it with split_at"):
        explainable.prefix(IDS)
    with pytest.raises(
        InputError, match=r"\(3, 6, 8\).*bind the arguments that the prefix was called with"
    ):
        head.bind(ids=IDS[:1, :4])(embed(IDS))
    never, _ = fxshap.make_explainable(encoder).split_at("mixer.self_attn.out_proj")
    with pytest.raises(InputError, match="the output of 'mixer.*out_proj' .*never calls"):
        never(IDS)
    _, twice = fxshap.make_explainable(Twice()).split_at("layer")
    with pytest.raises(InputError, match="the output of 'layer' .*2 times"):
        twice.bind(x=normal(1, 3, seed=1))(normal(2, 3, seed=2))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


# --- bound inputs -------------------------------------------------------------------------------


class Tabular(nn.Module):
    """Numbers, a category for every row, and a switch; the category stands in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(4, 5)
        self.numbers, self.dates = nn.Linear(3, 5), nn.Linear(2, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, numbers: Tensor, kind: Tensor, dates: Tensor, *, sharp: bool = False):
        h = F.gelu(self.numbers(numbers)) * self.kinds(kind) + torch.tanh(self.dates(dates))
        y = self.head(h)
        return y.square() if sharp else y.sigmoid()


@pytest.fixture(scope="module")
def tabular() -> nn.Module:
    return built(Tabular())


KIND = torch.tensor([2, 0, 3])
SAMPLES = [normal(3, 3, seed=1), normal(3, 2, seed=2)]
REFERENCES = [normal(5, 3, seed=3), normal(5, 2, seed=4)]


@pytest.mark.parametrize("sharp", [False, True])
def test_integers_are_bound_and_the_rest_explained(tabular, sharp):
    explainable = fxshap.make_explainable(tabular)
    for row in range(3):
        one = slice(row, row + 1)
        model = explainable.bind(kind=KIND[one], sharp=sharp)
        samples = [x[one] for x in SAMPLES]
        values = explain(model, REFERENCES, samples)
        assert [phi.shape for phi in values] == [(1, 3, 2), (1, 2, 2)]
        assert additivity_error(model, REFERENCES, samples, values) <= EXACT
        with torch.no_grad():
            expected = tabular(samples[0], KIND[one], samples[1], sharp=sharp)
            assert torch.equal(model(*samples), expected)
    assert len(explainable._calls.captures.engines) == 1


def test_captum_matches_bound_arguments_row_by_row(tabular):
    model = fxshap.make_explainable(tabular, forward_kwargs={"kind": KIND})
    found, delta = ca.DeepLift(model).attribute(
        tuple(SAMPLES), tuple(x[:3] for x in REFERENCES), target=1, return_convergence_delta=True
    )
    assert len(found) == 2 and delta.abs().max() <= EXACT


def test_shap_needs_bound_arguments_of_one_row(tabular):
    model = fxshap.make_explainable(tabular).bind(kind=KIND)
    with pytest.raises(InputError, match=r"'kind' is bound with 3 rows.*bind\(kind=kind\[i:i\+1\]"):
        shap.DeepExplainer(model, REFERENCES)
    with pytest.raises(InputError, match="'kind' is bound with 3 rows, but this call has 5"):
        model(*REFERENCES)


def test_only_some_of_the_numbers_are_explained(tabular):
    model = fxshap.make_explainable(tabular, input_names="dates")
    model = model.bind(numbers=SAMPLES[0][:1], kind=KIND[:1])
    (values,) = explain(model, REFERENCES[1:], SAMPLES[1:])
    assert additivity_error(model, REFERENCES[1:], SAMPLES[1:], values=[values]) <= EXACT


def test_every_call_uses_its_own_bound_arguments(tabular):
    """Captures are shared, bound arguments are not."""
    explainable = fxshap.make_explainable(tabular)
    values = []
    for kind in (0, 1, 0):
        model = explainable.bind(kind=torch.tensor([kind]))
        values.append(explain(model, REFERENCES, SAMPLES)[0])
    assert np.abs(values[0] - values[1]).max() > 1e-3
    np.testing.assert_array_equal(values[0], values[2])


def test_a_copy_has_the_same_bound_arguments(tabular):
    model = fxshap.make_explainable(tabular).bind(kind=KIND[:1])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(*SAMPLES), model(*SAMPLES))
    np.testing.assert_array_equal(
        explain(copied, REFERENCES, SAMPLES)[0], explain(model, REFERENCES, SAMPLES)[0]
    )


def test_errors_of_binding(tabular):
    explainable = fxshap.make_explainable(tabular)
    with pytest.raises(InputError, match="takes no 'kinds'; it takes numbers, kind, dates, sharp"):
        explainable.bind(kinds=KIND)
    with pytest.raises(InputError, match="takes no 'number'"):
        fxshap.make_explainable(tabular, input_names=["number"])
    with pytest.raises(InputError, match="3 inputs were given.*only numbers, dates"):
        explainable.bind(kind=KIND)(*SAMPLES, SAMPLES[0])
    with pytest.raises(InputError, match="input 1 is of torch.int64.*explainable.bind"):
        shap.DeepExplainer(explainable, [REFERENCES[0], torch.zeros(5).long(), REFERENCES[1]])


def test_a_wrapper_may_pass_keywords_and_tensors_without_rows():
    class Inner(nn.Module):
        def forward(self, x: Tensor, *, weights: Tensor, shift: dict[str, Tensor]) -> Tensor:
            return torch.tanh(x @ weights) + shift["by"]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fxshap.make_explainable(Inner())
            self.weights = normal(3, 2, seed=7)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, weights=self.weights, shift={"by": torch.tensor(2.0)})

    model = Outer()
    values = explain(model, REFERENCES[:1], SAMPLES[:1])
    assert additivity_error(model, REFERENCES[:1], SAMPLES[:1], values) <= EXACT


# --- keyword inputs, several outputs ------------------------------------------------------------


class Sequence(nn.Module):
    """Outputs of shape (rows, steps, classes) in a dict, from a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, ids: Tensor | None = None, *, embeds: Tensor | None = None, top: bool = True):
        h = torch.cumsum(torch.tanh(self.hidden(embeds)), 1)
        return {"logits": self.head(h), "hidden": h, "all": (h, self.head(h))}


STEPS, BACKGROUND = normal(2, 4, 3, seed=5), normal(3, 4, 3, seed=6)

OUTPUTS = {
    "a_class_at_a_step": (lambda y: y["logits"][:, -1, 2:3], lambda y: y["logits"][:, -1, 2:3]),
    "classes_at_a_step": (lambda y: y["logits"][:, 1], lambda y: y["logits"][:, 1]),
    "everything": (lambda y: y["logits"].flatten(1), lambda y: y["logits"].flatten(1)),
    "sum_over_steps": (lambda y: y["logits"].sum(1), lambda y: y["logits"].sum(1)),
    "tuple_in_dict": (lambda y: y["all"][1][:, 0], lambda y: y["logits"][:, 0]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_selects_a_class_or_a_step(name):
    output, expected = OUTPUTS[name]
    model = built(Sequence())
    explainable = fxshap.make_explainable(model, input_names="embeds", output=output)
    with torch.no_grad():
        assert torch.equal(explainable(STEPS), expected(model(embeds=STEPS)))
    values = explain(explainable, [BACKGROUND], [STEPS])
    assert additivity_error(explainable, [BACKGROUND], [STEPS], values) <= EXACT


@pytest.mark.parametrize("index", [0, 2, -1])
def test_an_index_of_a_tensor_is_a_class_or_a_step(index):
    class Steps(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(embeds=x)["logits"]

    class Classes(Steps):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, -1]

    for build, pick in ((Steps, lambda y: y[:, index]), (Classes, lambda y: y[:, [index]])):
        model = built(build())
        explainable = fxshap.make_explainable(model, output=index)
        with torch.no_grad():
            assert torch.equal(explainable(STEPS), pick(model(STEPS)))
        values = explain(explainable, [BACKGROUND], [STEPS])
        assert additivity_error(explainable, [BACKGROUND], [STEPS], values) <= EXACT
    with pytest.raises(OutputError, match="output=7 is not in the model's result"):
        fxshap.make_explainable(model, output=7)(STEPS)


@pytest.mark.parametrize("order", ["max", "min", "max_abs"])
@pytest.mark.parametrize("columns", [1, 4])
def test_ranked_outputs(order, columns):
    model = built(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, columns)))
    explainable = fxshap.make_explainable(model)
    (everything,) = explain(explainable, [BACKGROUND], [STEPS])
    values, ranks = shap.DeepExplainer(explainable, BACKGROUND).shap_values(
        STEPS, ranked_outputs=2, output_rank_order=order,
        check_additivity=False,  # SHAP compares the first rank with the first column, and so on
    )  # fmt: skip
    with torch.no_grad():
        y = model(STEPS)
    key = {"max": -y, "min": y, "max_abs": -y.abs()}[order]
    assert torch.equal(ranks.long(), key.argsort(1)[:, :2])
    chosen = np.stack([everything[row][..., ranks[row].numpy()] for row in range(2)])
    np.testing.assert_array_equal(values, chosen)


def test_inputs_that_are_constant_or_unused_get_nothing():
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor, unused: Tensor) -> Tensor:
            return torch.tanh(a * b.exp())

    explainable = fxshap.make_explainable(Model())
    b = normal(1, 3, seed=8)
    references = [normal(5, 3, seed=9), b.expand(5, 3), normal(5, 2, seed=10)]
    samples = [normal(2, 3, seed=11), b.expand(2, 3), normal(2, 2, seed=12)]
    values = explain(explainable, references, samples)
    assert additivity_error(explainable, references, samples, values) <= EXACT
    assert values[0].any() and not values[1].any() and not values[2].any()


class Table(nn.Module):
    """Looks its weights up in an array that is an argument."""

    def forward(self, x, table):
        return torch.tanh(x @ torch.from_numpy(table))


def test_arrays_that_differ_in_the_middle_are_captured_separately():
    first = np.ones((40, 40), dtype=np.float32)  # its text is abbreviated
    second = first.copy()
    second[20, 20] = 9.0
    explainable = fxshap.make_explainable(Table())
    references, samples = torch.randn(4, 40), torch.randn(2, 40)
    for table in (first, second):
        explainer = shap.DeepExplainer(explainable.bind(table=table), references)
        expected = shap.DeepExplainer(
            fxshap.make_explainable(Table(), forward_kwargs={"table": table}), references
        )
        np.testing.assert_array_equal(explainer.shap_values(samples), expected.shap_values(samples))


def test_a_split_model_leaves_the_calls_of_other_threads_as_they_are(encoder):
    from threading import Thread

    from fxshap.frontend.entry import substitute_tensors
    from fxshap.frontend.hook_point import find_hook_point

    hook_point = find_hook_point(encoder, "norm", "output")
    expected, results = encoder(IDS, SEEN), []
    with pytest.raises(InputError, match="never calls"):
        with substitute_tensors(encoder, hook_point, [torch.zeros(1)]):
            thread = Thread(target=lambda: results.append(encoder(IDS, SEEN)))
            thread.start()
            thread.join()
    torch.testing.assert_close(results[0], expected)
