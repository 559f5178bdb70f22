"""Estimates of the memory and the time that a quantization needs, from the sizes of the layers alone.

The constants count what the code of this package holds or computes. They were compared with measured runs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gemma_awq_cli.awq import known_grid
from gemma_awq_cli.awq.gram import block_width
from gemma_awq_cli.awq.round_group import GPU_PART, PART
from gemma_awq_cli.awq.search import RATIOS, Effort
from gemma_awq_cli.models.forward.layerwise import GPU_LOGIT_CHUNK, LOGIT_CHUNK
from gemma_awq_cli.models.gemma.layers import Experts, LayerLayout, Linear
from gemma_awq_cli.quantize.expert_inputs import SEARCHED, TOKENS_AT_A_TIME
from gemma_awq_cli.quantize.information_layout import BATCH_SHARE, LOGITS, matrix_sizes, measured_rows
from gemma_awq_cli.quantize.own_rows import OwnRows

FLOAT32 = 4  # bytes

# Memory, in bytes.
# torch, transformers and a tokenizer of 262144 entries before any weight, and 150 MB that the C library keeps for the
# next result (`memory.reuse_freed_memory`)
LIBRARY_BYTES = 850_000_000
# Of a GPU with memory of its own. These two are estimates that no run has been compared with.
CUDA_LIBRARY_BYTES = 2_500_000_000  # CUDA's libraries in the system's memory
CONTEXT_BYTES = 800_000_000  # the driver's context and cuBLAS's workspaces in the GPU's memory
FRAGMENTED = 1.1  # what PyTorch's allocator reserves for each byte that is used
OBSERVED_WEIGHT = 6  # of a weight of the layer that is observed: 16-bit as it was read, float32 in the module
READ_AHEAD_WEIGHT = 2  # of a weight of the next layer, in the system's memory while a GPU computes
HELD_WEIGHT = 3  # of a weight of the layer that is being rounded: 16-bit, and the packed ones that are finished
GROUP_WEIGHT = 6  # of a weight of the group: float32, and one integer each by compensation and by round-to-nearest
# of an entry of a block's Gram matrix: scaled, reordered by rows and then by columns, and factored there
BLOCK_ENTRY = 16
KEPT_WEIGHT = 6  # of a weight of the linear whose grid is kept: integers, and their packing
KEPT_PART_WEIGHT = 48  # of a weight of the rows whose grids are found at a time: twelve float32 matrices
PART_WEIGHT = 32  # of a weight of the rows that are rounded at a time: eight float32 matrices
PROVED_WEIGHT = 6.6  # of a weight of experts whose folds are proved: 16-bit, packed, and float32 in the module
# of a weight of experts that are observed: freed blocks between others, which the C library keeps from the second layer
# on (measured at the shape of Gemma 4 26B-A4B)
FREED_WEIGHT = 0.9
HEAD_WEIGHT = 2  # of a weight of the head, read in 16 bits
HIDDEN_COPIES = 8  # float32 hidden states of a token inside a layer: residual, norms, attention's inputs and output
STREAM_COPIES = 5  # of the same for each further stream (AltUp): input, predictions, innovations, corrected, their copy
# activations as wide as the widest input: an MLP's input, both projections, their product, and its weighted copy
WIDE_COPIES = 5
# activations as wide as a layer's per-layer input: itself, the gate, its activation, their product
PER_LAYER_COPIES = 4
UNPACKED_WEIGHT = 4  # of a weight of the layer that stays in 16 bits: float32 in the module
LOGIT_COPIES = 8  # float32 rows of one chunk of logits: both paths, their log probabilities and differences
# of an entry of a matrix of Fisher information: of all matrices of a group as they are read and in float32, and of the
# one that is factored, reordered by rows and then by columns, and the gains
INFORMATION_ENTRY, FACTORED_ENTRY = 10, 12
# float32 activations that are kept for the gradient: as wide as the hidden states, and as the widest linear
KEPT_HIDDEN, KEPT_WIDE = 24, 5
KEPT_STATES = 10  # of a hidden state of all measured rows: 16-bit, and the gradients at both ends of a layer
KEPT_LOGIT = 8  # of a logit of the positions and the part of the vocabulary that are computed at a time: two in float32
KEY_AND_VALUE = 4  # of a channel of a cache in 16 bits
DRAWN_LOGIT = 16  # of a logit of the tokens that are drawn: float32 logits, their weights and copies of either
FINAL_COPIES = 4  # float32 final hidden states of a held-out token: both paths, before and after the norm

# Time. How fast the machine multiplies is measured (`products.flops_per_second`); elementwise operations are those of
# two CPU cores.
ELEMENTS_PER_SECOND = 1.5e9
BFLOAT16_SPEED = 1.6  # times as many products in bfloat16, where they are multiplied so
GRAM_SPEED = 3.0  # the same of a Gram matrix, of which half the products are computed
START_SECONDS = 5  # imports, tokenizer, calibration text
TRY_OPERATIONS = 10  # elementwise operations per weight to judge one scale
RANGE_OPERATIONS = 5  # the same, to judge one range
KEEP_OPERATIONS = 40  # elementwise operations per weight to find the grid that it is on
# elementwise operations of a token in a layer, per hidden state (norms, rotations, sums) and per activation of an MLP
HIDDEN_OPERATIONS, MLP_OPERATIONS = 45, 9
# Of what is done to a rounded weight once: flops per weight and channel of its block, and elementwise operations per
# weight, which count as much in narrow blocks. Compared with each step by itself, in blocks of 640 to 8192 channels.
ROUND_FLOPS, ROUND_OPERATIONS = 5, 50  # the compensation, and the errors that are compared
REFINE_FLOPS, REFINE_OPERATIONS = 3, 10  # to fit the scales once
SWEEP_FLOPS, SWEEP_OPERATIONS = 2, 60  # one pass over the integers
CHOLESKY_FLOPS = 2  # per channel and squared size of its block: two factors and their reordering, by their time
CORRECT_TOKEN_FLOPS = 4  # per token and entry of a Gram matrix: the product of error and input, twice for both paths
GRADIENT_PASSES = 3  # of the rows that information is measured on through a layer: forward, again, and backward
DRAW_OPERATIONS = 5  # elementwise operations per logit to draw two labels
SAMPLING_SPEED = 0.65  # times as many products while rows are sampled, a token of each at a time
SAMPLE_OPERATIONS = 7  # elementwise operations per logit to draw one token
FACTOR_FLOPS = 3  # per cubed size of a matrix of information: its factor and the gains
FORWARDS_WITH_CORRECTION = 3  # of a calibration row through a layer: reference, quantized, and quantized once more


@dataclass(frozen=True)
class Fit:
    """The settings that trade memory for speed or reach.

    gram_limit: linears with more inputs than this keep their Gram matrix in blocks.
    """

    tokens_per_batch: int
    gram_limit: int


@dataclass(frozen=True)
class Workload:
    """Everything that the estimates depend on, apart from the fit.

    vocabulary: entries of the embedding; calibration_tokens, heldout_tokens: of all rows together; seq_len: of one row;
    product_bytes: of an activation as linears multiply it, 2 or 4; keeps_grid: see `Plan`; streams: of hidden states,
    more than one with AltUp; on_gpu: whether a GPU computes, CUDA's or Apple's; unsampled_tokens: of the calibration
    tokens, those that the model has yet to sample itself.
    """

    layouts: tuple[LayerLayout, ...]
    vocabulary: int
    hidden: int
    calibration_tokens: int
    heldout_tokens: int
    seq_len: int
    group_size: int
    product_bytes: int
    effort: Effort
    keeps_grid: bool = False
    streams: int = 1
    on_gpu: bool = False
    unsampled_tokens: int = 0

    @property
    def layers_depend(self) -> bool:
        """Whether each layer is corrected for how those before it were quantized."""
        return self.effort.paths > 1 and not self.keeps_grid

    @property
    def information_rows(self) -> tuple[int, int] | None:
        """The rows, and the tokens of each, that feedback between rows is measured on; None without feedback."""
        if not self.effort.feedback or self.keeps_grid:
            return None
        return measured_rows(self.calibration_tokens // self.seq_len, self.seq_len)

    @property
    def information_tokens(self) -> int:
        """All of these tokens."""
        return 0 if self.information_rows is None else math.prod(self.information_rows)


def peak_bytes(work: Workload, fit: Fit) -> int:
    """Return the peak memory of a device that shares the system's."""
    return LIBRARY_BYTES + _computing(work, fit)


def device_peak_bytes(work: Workload, fit: Fit) -> int:
    """Return the peak of a GPU's own memory."""
    return CONTEXT_BYTES + int(FRAGMENTED * _computing(work, fit))


def host_peak_bytes(work: Workload) -> int:
    """Return the peak of the system's memory while a GPU with its own computes: a layer as it is read, and its results.

    The next layer is read meanwhile, and experts' tokens are kept there too. At the start it is the embedding, at the
    end the head.
    """
    layers = max(
        (HELD_WEIGHT + READ_AHEAD_WEIGHT) * _weights(layout)
        + (_expert_tokens(work, layout.experts) if layout.experts is not None else 0)
        for layout in work.layouts
    )
    return LIBRARY_BYTES + CUDA_LIBRARY_BYTES + max(layers, HEAD_WEIGHT * work.vocabulary * work.hidden)


def _computing(work: Workload, fit: Fit) -> int:
    """Bytes of the largest layer's stages, or of comparing the predictions at the end."""
    layers = max(
        max(
            _observing(work, fit, layout),
            _rounding(work, fit, layout),
            _proving(layout),
            _informing(work, fit, layout),
        )
        for layout in work.layouts
    )
    head = HEAD_WEIGHT * work.vocabulary * work.hidden
    chunk = GPU_LOGIT_CHUNK if work.on_gpu else LOGIT_CHUNK
    per_token = LOGIT_COPIES * chunk + (FINAL_COPIES + work.streams - 1) * work.hidden
    comparing = head + work.heldout_tokens * FLOAT32 * per_token
    sampling = head + KEPT_LOGIT * LOGITS + KEPT_STATES * work.information_tokens * work.streams * work.hidden
    return max(layers, comparing, sampling if work.information_tokens else 0)


def _observing(work: Workload, fit: Fit, layout: LayerLayout) -> int:
    """Bytes while the calibration rows run through a layer and its Gram matrices are summed."""
    # no more than there are, and at least one row at a time; with a correction, its copies on both paths
    there = max(work.effort.paths * work.calibration_tokens, work.heldout_tokens)
    tokens = max(min(fit.tokens_per_batch, there), work.effort.paths * work.seq_len)
    # the held-out rows are computed in float32 even if the calibration rows are not
    wide = max(tokens * work.product_bytes, min(tokens, work.heldout_tokens) * FLOAT32)
    widest = max(group.inputs for group in _joined_groups(layout))
    states = (HIDDEN_COPIES + (work.streams - 1) * STREAM_COPIES) * layout.hidden
    shared = 0 if layout.kv_source is None else 2 * layout.kv_heads * layout.head_dim
    activations = tokens * FLOAT32 * (states + shared + PER_LAYER_COPIES * layout.per_layer_width)
    activations += wide * WIDE_COPIES * widest
    scores = max(1, tokens // work.seq_len) * layout.heads * work.seq_len**2 * FLOAT32
    if layout.experts is not None:  # an expert may get all of them
        activations += tokens * FLOAT32 * (2 * layout.hidden + 4 * layout.experts.intermediate)
        activations += int(FREED_WEIGHT * _expert_weights(layout.experts))
    weights = OBSERVED_WEIGHT * _weights(layout) + UNPACKED_WEIGHT * _kept(layout)
    return weights + _grams(work, fit, layout) + _expert_inputs(work, fit, layout) + activations + scores


def _rounding(work: Workload, fit: Fit, layout: LayerLayout) -> int:
    """Bytes while the largest group of a layer is rounded."""
    if work.keeps_grid:
        linear = max(linear.outputs * linear.inputs for linear in layout.linears.values())
        return HELD_WEIGHT * _weights(layout) + KEPT_WEIGHT * linear + KEPT_PART_WEIGHT * min(linear, known_grid.PART)
    largest = 0
    for names in layout.groups:
        group = layout.joined(names.linears)
        own = _rounding_group(work, fit, group)
        if work.information_tokens:
            sizes = matrix_sizes(layout, names)
            own += INFORMATION_ENTRY * sum(size**2 for size in sizes) + FACTORED_ENTRY * max(sizes) ** 2
            own += FLOAT32 * group.outputs * block_width(group.inputs, work.group_size, fit.gram_limit)
        largest = max(largest, own)
    if (experts := layout.experts) is not None:
        gate_up = _expert_groups(experts)[0]
        gram = FLOAT32 * gate_up.inputs * block_width(gate_up.inputs, work.group_size, fit.gram_limit)
        states = TOKENS_AT_A_TIME * FLOAT32 * (2 * gate_up.inputs + 2 * gate_up.outputs)
        samples = FLOAT32 * SEARCHED * work.effort.rows * gate_up.inputs
        largest = max(largest, _rounding_group(work, fit, gate_up) + gram + states) + samples
    kept = _grams(work, fit, layout) + _expert_inputs(work, fit, layout)
    kept += 2 * _information_entries(layout) if work.information_tokens else 0
    return HELD_WEIGHT * _weights(layout) + kept + largest


def _rounding_group(work: Workload, fit: Fit, group: Linear) -> int:
    """Bytes while one group is rounded."""
    block = block_width(group.inputs, work.group_size, fit.gram_limit)
    part = PART_WEIGHT * min(group.outputs * block, GPU_PART if work.on_gpu else PART)
    return GROUP_WEIGHT * group.inputs * group.outputs + BLOCK_ENTRY * block**2 + part


def _proving(layout: LayerLayout) -> int:
    """Bytes while the folds of a layer with experts are proved. Other layers are smaller than their Gram matrices."""
    return 0 if layout.experts is None else int(PROVED_WEIGHT * _weights(layout))


def _informing(work: Workload, fit: Fit, layout: LayerLayout) -> int:
    """Bytes while the information of a layer's outputs is measured."""
    if work.information_rows is None:
        return 0
    seq_len = work.information_rows[1]
    batch = max(seq_len, min(fit.tokens_per_batch // BATCH_SHARE, work.information_tokens))
    widest = max(max(group.inputs, group.outputs) for group in _joined_groups(layout))
    wide = widest if layout.experts is None else widest + layout.experts.active * 4 * layout.experts.intermediate
    activations = batch * FLOAT32 * (KEPT_HIDDEN * work.streams * layout.hidden + KEPT_WIDE * wide)
    scores = 3 * FLOAT32 * layout.heads * seq_len * batch
    states = KEPT_STATES * work.information_tokens * work.streams * layout.hidden
    weights = OBSERVED_WEIGHT * _weights(layout) + UNPACKED_WEIGHT * _kept(layout)
    return weights + FLOAT32 * _information_entries(layout) + states + activations + scores


def _information_entries(layout: LayerLayout) -> int:
    """Entries of all matrices of information of a layer."""
    return sum(size**2 for group in layout.groups for size in matrix_sizes(layout, group))


def sampling_bytes(layouts: tuple[LayerLayout, ...], vocabulary: int, weight_bytes: int, own: OwnRows) -> int:
    """Return the bytes that sampling takes: the whole 16-bit model, and a text's cache and one token's logits each."""
    cache = KEY_AND_VALUE * own.at_once * own.text_len * sum(one.kv_size for one in layouts if one.kv_source is None)
    return weight_bytes + cache + DRAWN_LOGIT * own.at_once * vocabulary


def information_disk_bytes(work: Workload) -> int:
    """Return how many bytes the files of the information take: inputs and matrices in 16 bits, two gradients."""
    if not work.information_tokens:
        return 0
    matrices = sum(2 * _information_entries(layout) for layout in work.layouts)
    states = 2 * (len(work.layouts) + 1) + 2 * FLOAT32
    return matrices + states * work.information_tokens * work.streams * work.hidden


def _expert_inputs(work: Workload, fit: Fit, layout: LayerLayout) -> int:
    """Bytes of the tokens that are kept for the experts of a layer, and of the Gram matrix of them all."""
    if (experts := layout.experts) is None:
        return 0
    gram = FLOAT32 * experts.hidden * block_width(experts.hidden, work.group_size, fit.gram_limit)
    return _expert_tokens(work, experts) + gram


def _expert_tokens(work: Workload, experts: Experts) -> int:
    """Bytes of the tokens that are kept for the experts of a layer."""
    token = 2 * experts.hidden + experts.active * (8 + FLOAT32) + 2 * FLOAT32
    return work.calibration_tokens * token


def _grams(work: Workload, fit: Fit, layout: LayerLayout) -> int:
    """Bytes of the Gram matrices of all groups of a layer. With a correction there are two per group."""
    if work.keeps_grid:
        return 0
    entries = (
        block_width(group.inputs, work.group_size, fit.gram_limit) * group.inputs for group in _joined_groups(layout)
    )
    return work.effort.paths * FLOAT32 * sum(entries)


def _weights(layout: LayerLayout) -> int:
    """Number of all parameters of a layer."""
    linears = sum(linear.outputs * linear.inputs for linear in layout.linears.values())
    if layout.experts is not None:
        linears += _expert_weights(layout.experts)
    return linears + sum(norm.size for norm in layout.norms.values())


def _expert_weights(experts: Experts) -> int:
    return sum(math.prod(shape) for shape in experts.stacked().values())


def _kept(layout: LayerLayout) -> int:
    """Number of the weights of a layer that stay in 16 bits, without norms."""
    return sum(math.prod(shape) for shape in layout.kept.values())


def _joined_groups(layout: LayerLayout) -> Iterator[Linear]:
    """Each group of a layer as one linear."""
    return (layout.joined(group.linears) for group in layout.groups)


def _expert_groups(experts: Experts) -> tuple[Linear, Linear]:
    """The two groups of one expert, gate_up and down, each as one linear."""
    return Linear(2 * experts.intermediate, experts.hidden), Linear(experts.hidden, experts.intermediate)


def seconds(work: Workload, fit: Fit, flops_per_second: float, processes: int = 1) -> float:
    """Return how long the quantization takes on a CPU.

    flops_per_second: of its products in float32; processes: how many share out the layers, each on as many cores of its
    own. Each runs the calibration rows through all layers, and one of them measures. Where layers depend on one another
    they share out the rows of each instead; one of them measures what feedback is made from, and each searches and
    factors for itself. What they tell one another is not counted.
    """
    if processes == 1 or work.layers_depend:
        return _seconds(work, fit, flops_per_second, processes)
    alone = forward_seconds(work, flops_per_second)
    return alone + max(0.0, _seconds(work, fit, flops_per_second, 1) - alone) / processes


def forward_seconds(work: Workload, flops_per_second: float, sharing: int = 1) -> float:
    """Return how long the start, all that runs through the layers, and the head take, without any search.

    sharing: how many processes share out the calibration rows of each layer.
    """
    flops = 4.0 * work.heldout_tokens * work.vocabulary * work.hidden  # two flops per weight, on both paths
    flops += 2.0 * _tokens(work, sharing) * sum(_multiplied(layout) for layout in work.layouts)
    flops += sum(_attention_flops(work, layout, sharing) for layout in work.layouts)
    elements = sum(_forward_elements(work, layout, sharing) for layout in work.layouts)
    return START_SECONDS + flops / flops_per_second + elements / ELEMENTS_PER_SECOND


def _seconds(work: Workload, fit: Fit, flops_per_second: float, sharing: int) -> float:
    """`seconds` of one process. sharing: how many work on each layer."""
    flops = _information_flops(work) + _sampling_flops(work)
    elements = float(work.vocabulary)
    elements *= DRAW_OPERATIONS * work.information_tokens + SAMPLE_OPERATIONS * work.unsampled_tokens
    for layout in work.layouts:
        flops += _feedback_flops(work, layout)
        flops += sum(_group_flops(work, fit, group, sharing=sharing) for group in _joined_groups(layout))
        elements += sum(_group_elements(work, layout.joined(g.linears), len(g.linears), sharing) for g in layout.groups)
        if (experts := layout.experts) is not None:
            flops += _expert_flops(work, fit, experts)
            elements += sum(
                experts.count * _group_elements(work, group, 1, sharing) for group in _expert_groups(experts)
            )
    forward = forward_seconds(work, flops_per_second, sharing)
    return forward + flops / flops_per_second + elements / ELEMENTS_PER_SECOND


def _information_flops(work: Workload) -> float:
    """Floating-point operations to measure the information of all layers' outputs."""
    if not work.information_tokens:
        return 0.0
    flops = 2.0 * work.vocabulary * work.hidden
    for layout in work.layouts:
        flops += 2.0 * GRADIENT_PASSES * _multiplied(layout) + _information_entries(layout)
    return work.information_tokens * flops


def _sampling_flops(work: Workload) -> float:
    """The same to sample rows, or as many as would take as long."""
    weights = work.vocabulary * work.hidden + sum(_multiplied(layout) for layout in work.layouts)
    return 2.0 * work.unsampled_tokens * weights / SAMPLING_SPEED


def _attention_flops(work: Workload, layout: LayerLayout, sharing: int) -> float:
    """Floating-point operations of a layer's attention: scores and values, of half the keys on the mean."""
    return 2.0 * _passes(work, sharing) * work.seq_len * layout.heads * layout.head_dim


def _forward_elements(work: Workload, layout: LayerLayout, sharing: int) -> float:
    """Elementwise operations of all tokens in a layer."""
    inner = layout.intermediate
    if (experts := layout.experts) is not None:
        inner += experts.active * experts.intermediate
    return _passes(work, sharing) * float(HIDDEN_OPERATIONS * layout.hidden * work.streams + MLP_OPERATIONS * inner)


def _multiplied(layout: LayerLayout) -> float:
    """Number of the weights of a layer that a token is multiplied with."""
    weights = float(sum(group.inputs * group.outputs for group in _joined_groups(layout)) + _kept(layout))
    if (experts := layout.experts) is not None:
        weights += _expert_weights(experts) * experts.active / experts.count
    return weights


def _feedback_flops(work: Workload, layout: LayerLayout) -> float:
    """Floating-point operations for the feedback between the rows of a layer's weights."""
    flops = 0.0
    for group in layout.groups if work.information_tokens else ():
        inputs = layout.joined(group.linears).inputs
        flops += sum(FACTOR_FLOPS * size**3 + inputs * size**2 for size in matrix_sizes(layout, group))
    return flops


def _expert_flops(work: Workload, fit: Fit, experts: Experts) -> float:
    """Floating-point operations in matrix products for all experts of a layer, beside its forward."""
    share = experts.active / experts.count
    gate_up, down = _expert_groups(experts)
    block = block_width(gate_up.inputs, work.group_size, fit.gram_limit)
    # the states of a token are multiplied once more, and enter the Gram matrix twice
    again = 2.0 * work.calibration_tokens * share * gate_up.inputs * (gate_up.outputs + block)
    uncorrected = replace(work, effort=work.effort._replace(correction=0.0))  # as the experts are
    return experts.count * (again + sum(_group_flops(uncorrected, fit, group, share) for group in (gate_up, down)))


def _group_flops(work: Workload, fit: Fit, group: Linear, share: float = 1.0, sharing: int = 1) -> float:
    """Floating-point operations in matrix products for one group of linears, beside its forward.

    share: of the tokens that reach it; sharing: see `_seconds`: each has as many fewer tokens, and outputs to round.
    """
    if work.keeps_grid:
        return 0.0
    effort, (k, n) = work.effort, (group.inputs, group.outputs)
    block = block_width(k, work.group_size, fit.gram_limit)
    tokens, outputs = share * work.calibration_tokens / sharing, n / sharing
    flops = 2.0 * tokens * k * block / (GRAM_SPEED if work.product_bytes == 2 else 1.0)  # the Gram matrix
    flops += CHOLESKY_FLOPS * k * block**2 + ROUND_FLOPS * outputs * k * block
    if effort.correction:
        flops += CORRECT_TOKEN_FLOPS * tokens * k * block / _speed(work)
        flops += CHOLESKY_FLOPS / 2 * k * block**2 + ROUND_FLOPS * outputs * k * block  # factor and solve
    return flops + effort.refinements * (REFINE_FLOPS + SWEEP_FLOPS * effort.sweeps) * outputs * k * block


def _tokens(work: Workload, sharing: int = 1) -> float:
    """How many tokens linears multiply, in float32 or as long as it would take."""
    return _passes(work, sharing, _speed(work))


def _passes(work: Workload, sharing: int = 1, speed: float = 1.0) -> float:
    """How many tokens pass through a layer, as often as they do. speed: of those that calibrate."""
    forwards = FORWARDS_WITH_CORRECTION if work.effort.correction else 1
    # held-out rows take both paths, in one process
    return forwards * work.calibration_tokens / sharing / speed + 2 * work.heldout_tokens


def _speed(work: Workload) -> float:
    return BFLOAT16_SPEED if work.product_bytes == 2 else 1.0


def _group_elements(work: Workload, group: Linear, linears: int, sharing: int) -> float:
    """Elementwise operations of the searches and the rounding for one group of linears, on rows that are shared out."""
    effort = work.effort
    if work.keeps_grid:
        return float(KEEP_OPERATIONS * group.outputs * group.inputs)
    candidates = 2 * RATIOS / effort.stride + effort.descent
    sampled = min(group.outputs, effort.rows * linears)
    searching = TRY_OPERATIONS * candidates * sampled * group.inputs
    rounding = RANGE_OPERATIONS * len(effort.shrinks) + ROUND_OPERATIONS
    rounding += effort.refinements * (REFINE_OPERATIONS + SWEEP_OPERATIONS * effort.sweeps)
    return searching + rounding * group.outputs * group.inputs / sharing
