"""Bytes that are live for a while beside the records: inside one block, around the logits, under a weight.

Counted from the locals of the reference operations where each phase is widest; the widest phase decides.
`tests/estimate/test_measured.py` holds the sums against what a step really allocates.
"""

from __future__ import annotations

from math import ceil

from lora.backend.gemm import WIDENED_BYTES
from lora.backend.threads import thread_count
from lora.estimate.activations import delta_channels, layer_record, recorded_layers
from lora.estimate.workload import STORED_BYTES, TRAINED_BYTES, Workload
from lora.host.attention import MOST_ROWS, scratch_elements
from lora.host.causal_conv1d import BLOCKS as CONVOLVED_BLOCKS
from lora.host.gated_delta_rule import CHUNK, groups_at_once
from lora.host.row_blocks import BLOCK_ELEMENTS
from lora.ops.attention import JOINED_TOKENS
from lora.ops.softmax_xent import CHUNK_BYTES, chunk_rows


def scratch_bytes(workload: Workload, tokens: int, longest: int) -> int:
    """Return what one block has live at once over `tokens` tokens in sequences of `longest`."""
    recorded = recorded_layers(workload)
    phases = [_embedding_gradient(workload, tokens)]
    if recorded:
        phases.append(_feed_forward_backward(workload, tokens))
    for kind in {kind for kind, _ in recorded}:
        backward = _delta_backward if kind == "linear_attention" else _attention_backward
        phases.append(_held_over_mixer(workload, tokens) + backward(workload, tokens, longest))
    if len(recorded) < workload.spec.num_hidden_layers:
        phases += [_unrecorded(workload, kind, tokens, longest) for kind in set(workload.spec.layer_types)]
    return max(phases)


def _feed_forward_backward(workload: Workload, tokens: int) -> int:
    narrow, wide = workload.activation_bytes, workload.wide_bytes
    # one gradient from above, and two that leave SwiGLU, widened for the products that they enter
    width = 3 * narrow + 2 * wide if narrow < wide else 3 * wide
    return tokens * (width * workload.spec.intermediate_size + 2 * narrow * workload.spec.hidden_size)


def _held_over_mixer(workload: Workload, tokens: int) -> int:
    """Return the gradients of the feed-forward and of the stream that live on under the mixer's backward."""
    held = 3 * (workload.spec.intermediate_size + workload.spec.hidden_size)
    return tokens * held * workload.activation_bytes


def _attention_backward(workload: Workload, tokens: int, longest: int) -> int:
    spec, narrow, wide = workload.spec, workload.activation_bytes, workload.wide_bytes
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    widened = narrow < wide
    held = 3 * (queries + keys)  # for q and k before and after their rotation, for o, for v
    if spec.qk_norm:
        held += queries + keys
    if spec.attn_output_gate:
        held += 3 * queries
    projection = 3 * spec.hidden_size + (queries + 2 * keys if widened else 0)
    attention = (4 if widened else 2) * keys
    return tokens * (held * narrow + max(projection, attention) * wide)


def _delta_backward(workload: Workload, tokens: int, longest: int) -> int:
    spec, narrow, wide = workload.spec, workload.activation_bytes, workload.wide_bytes
    channels, values = delta_channels(spec), spec.linear_num_value_heads * spec.linear_value_head_dim
    # what is kept of each chunk of a sequence, and what its gradients take
    kept = _delta_task(workload, longest, squares=5, rows=2, states=1) * ceil(longest / CHUNK)
    task = kept + _delta_task(workload, longest, squares=6, rows=5, states=3)
    rule = tokens * channels * narrow + _delta_tasks(workload, tokens, longest) * task
    projection = tokens * (3 * channels * narrow + 3 * spec.hidden_size * wide)
    return tokens * 3 * values * narrow + max(rule, projection)


def _delta_tasks(workload: Workload, tokens: int, longest: int) -> int:
    """Return how many tasks of the chunked rule run at once."""
    groups = workload.spec.linear_num_key_heads
    tasks = ceil(tokens / longest) * ceil(groups / _groups_at_once(workload, longest))
    return min(tasks, thread_count() if workload.device == "cpu" else tasks)


def _delta_task(workload: Workload, longest: int, *, squares: int, rows: int, states: int) -> int:
    """Return the bytes of a chunk in one task of the chunked rule.

    For each of its heads: `squares` arrays [C, C], `rows` pairs of [C, K] and [C, W], `states` arrays [K, W].
    """
    spec, chunk = workload.spec, min(CHUNK, longest)
    keys, values = spec.linear_key_head_dim, spec.linear_value_head_dim
    heads = spec.linear_num_value_heads // spec.linear_num_key_heads * _groups_at_once(workload, longest)
    elements = chunk * (squares * chunk + rows * (keys + values)) + states * keys * values
    return heads * elements * workload.wide_bytes


def _groups_at_once(workload: Workload, longest: int) -> int:
    """Return the key heads of one task of the chunked rule."""
    spec = workload.spec
    shared = spec.linear_num_value_heads // spec.linear_num_key_heads
    widths = (spec.linear_key_head_dim, spec.linear_value_head_dim)
    return min(spec.linear_num_key_heads, groups_at_once(longest, shared, *widths))


def _unrecorded(workload: Workload, kind: str, tokens: int, longest: int) -> int:
    """Return what the forward of a block takes whose record dies when the block ends."""
    spec, narrow, wide = workload.spec, workload.activation_bytes, workload.wide_bytes
    width = 3 * wide if narrow < wide else 2 * wide
    feed_forward = tokens * (width * spec.intermediate_size + 4 * narrow * spec.hidden_size)
    if kind == "linear_attention":
        task = _delta_task(workload, longest, squares=8, rows=4, states=3)
        mixer = _delta_tasks(workload, tokens, longest) * task
    else:
        mixer = 0
    return tokens * layer_record(spec, kind, {}).size(workload) + max(feed_forward, mixer)


def _embedding_gradient(workload: Workload, tokens: int) -> int:
    """Return what the two parts of a tied embedding's gradient take beside its place among the gradients."""
    if workload.method != "full" or not workload.spec.tie_word_embeddings or workload.task == "classify":
        return 0
    # all blocks' records are gone by now; what the two ends of the decoder hold for each token is not
    rows = 2 * workload.spec.vocab_size + 6 * tokens
    return rows * workload.spec.hidden_size * workload.wide_bytes


def thread_bytes(workload: Workload, tokens: int, longest: int) -> int:
    """Return what the threads of a CPU keep: scratch for the operation that takes most, and a mask."""
    if workload.device != "cpu":
        return 0
    most = max(_row_blocks(workload, tokens), _attention_tasks(workload, tokens, longest))
    mask = MOST_ROWS**2 * workload.spec.num_attention_heads // workload.spec.num_key_value_heads
    return (most + mask) * workload.wide_bytes


def _attention_tasks(workload: Workload, tokens: int, longest: int) -> int:
    """Return the elements of the tasks of attention that run at once."""
    spec, threads = workload.spec, thread_count()
    if "full_attention" not in spec.layer_types:
        return 0
    groups, rows = spec.num_key_value_heads, min(tokens, max(longest, 2 * JOINED_TOKENS))
    runs = ceil(tokens / rows)
    together = groups if runs >= threads else 1
    shared = spec.num_attention_heads // groups
    at_once = min(threads, runs * groups // together)
    return at_once * scratch_elements(together, rows, shared, spec.head_dim)


def _row_blocks(workload: Workload, tokens: int) -> int:
    """Return the elements of the blocks of rows that threads go through."""
    # SwiGLU's backward takes most: one array of its own, and five that are widened or rounded in passing
    arrays = 6 if workload.activation_bytes < workload.wide_bytes else 1
    whole = tokens * workload.spec.intermediate_size
    most = min(thread_count(), ceil(whole / BLOCK_ELEMENTS)) * arrays * min(BLOCK_ELEMENTS, whole)
    if "linear_attention" in workload.spec.layer_types:
        # or the convolution's, of four arrays
        whole, block = tokens * delta_channels(workload.spec), CONVOLVED_BLOCKS * BLOCK_ELEMENTS
        most = max(most, min(thread_count(), ceil(whole / block)) * 4 * min(block, whole))
    return most


def widening_bytes(workload: Workload) -> int:
    """Return the buffer that weights stored narrower than sums are taken pass through, block by block."""
    stored = TRAINED_BYTES if workload.method == "full" else STORED_BYTES[workload.weight_dtype]
    if stored == workload.wide_bytes:
        return 0
    largest = max(rows * columns for rows, columns in workload.modules.values())
    if workload.task != "classify":
        largest = max(largest, workload.spec.vocab_size * workload.spec.hidden_size)
    return min(WIDENED_BYTES, largest * workload.wide_bytes)


def logits_bytes(workload: Workload, tokens: int, longest: int) -> int:
    """Return the bytes of the largest chunk of logits, and of the hidden states that go in and out of it."""
    hidden = workload.spec.hidden_size * workload.wide_bytes
    if workload.task == "classify":
        return ceil(tokens / longest) * (workload.num_classes * workload.wide_bytes + 2 * hidden)
    row = workload.spec.vocab_size * workload.wide_bytes
    chunk = chunk_rows(tokens, row, CHUNK_BYTES) * (row + 2 * hidden)
    # a trained head's gradient comes in blocks of classes
    return chunk + tokens * hidden if workload.method == "full" else chunk


def head_gradient_bytes(workload: Workload) -> int:
    """Return the bytes of the gradient of the head, which exists before that of any block."""
    trained = workload.head_parameters
    if workload.method == "full" and workload.task != "classify":
        trained = workload.spec.vocab_size * workload.spec.hidden_size
    return trained * workload.wide_bytes
