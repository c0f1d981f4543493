"""The oracle of captured values: the model called directly under eager attention, its own outputs and hooks, figures in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from teacher_server.signals.captured import AttentionInputs, Captured, Wish

FFN = ("mlp", "block_sparse_moe")


@dataclass
class Inside:
    """Of one sequence, lists by block: states [L, D] (0 the embedding), maps [H, L, L], keys, values and contexts [L, .], u [L, F]."""

    final: torch.Tensor
    states: list[torch.Tensor]
    maps: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    contexts: list[torch.Tensor]
    ffn: list[torch.Tensor]


def inside(model, ids) -> Inside:
    """What an eager `AutoModelForCausalLM` makes of one sequence."""
    body, seen, handles = model.model, {}, []

    def keep(name, module, *, behind):
        def hook(module, args, output=None):
            found = output if behind else args[0]
            seen.setdefault(name, []).append((found[0] if isinstance(found, tuple) else found)[0].cpu())

        handles.append((module.register_forward_hook if behind else module.register_forward_pre_hook)(hook))

    for block in body.layers:
        keep("states", block, behind=True)
        keep("keys", block.self_attn.k_proj, behind=True)
        keep("values", block.self_attn.v_proj, behind=True)
        keep("contexts", block.self_attn.o_proj, behind=False)
        ffn = next(getattr(block, name) for name in FFN if hasattr(block, name))
        if hasattr(ffn, "down_proj"):
            keep("ffn", ffn.down_proj, behind=False)
        else:
            handles.append(
                ffn.experts.register_forward_pre_hook(lambda *seen_: seen.setdefault("ffn", []).append(routed(*seen_)))
            )
    with torch.no_grad():
        found = body(
            torch.tensor(np.asarray(ids), device=model.device).long()[None],
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    maps = [each[0].cpu() for each in found.attentions]
    assert len(maps) == len(body.layers), "eager attention shows its maps"
    states = [found.hidden_states[0][0].cpu(), *seen["states"]]
    return Inside(
        found.last_hidden_state[0].cpu(), states, maps, seen["keys"], seen["values"], seen["contexts"], seen["ffn"]
    )


def routed(experts, args):
    """Row by row and expert by expert: the sum of weight times the input of the expert's down projection."""
    x_RD, expert_RK, weight_RK = args
    rows = []
    for x_D, chosen_K, weight_K in zip(x_RD, expert_RK.tolist(), weight_RK, strict=True):
        u_F = 0
        for number, weight in zip(chosen_K, weight_K, strict=True):
            gate_F, up_F = linear(x_D, experts.gate_up_proj[number]).chunk(2)
            u_F = u_F + weight.double() * (torch.nn.functional.silu(gate_F) * up_F).double()
        rows.append(u_F)
    return torch.stack(rows).cpu()


def energy(u_LF):
    return torch.log(u_LF.double().norm(dim=-1) / u_LF.shape[-1] ** 0.5 + 1e-6)


def quantiles(u_LF):
    size = u_LF.double().abs()
    size = (size / size.sum(-1, keepdim=True)).cpu().numpy()
    parts = np.array_split(-np.sort(-size, axis=-1), 16, axis=-1) if size.shape[-1] % 16 == 0 else None
    assert parts is not None, "the oracle knows sixteen equal parts alone"
    return torch.from_numpy(np.stack([part.mean(-1) for part in parts], axis=-1))


def map_of(inputs: AttentionInputs, rows: slice, tokens: slice, positions) -> torch.Tensor:
    """[H, R, L] by the definition, in float64."""
    query, key = inputs.query_RHd[rows].double(), inputs.key_TGd[tokens].double()
    group = query.shape[1] // key.shape[1]
    maps = []
    for head in range(query.shape[1]):
        score = query[:, head] @ key[:, head // group].T * inputs.scale
        if inputs.softcap:
            score = inputs.softcap * torch.tanh(score / inputs.softcap)
        for row, position in enumerate(positions):
            score[row, position + 1 :] = -torch.inf
            if inputs.window is not None:
                score[row, : max(0, position - inputs.window + 1)] = -torch.inf
        maps.append(score.softmax(-1))
    return torch.stack(maps).cpu()


def relative(found, expected) -> float:
    """The largest distance of a row relative to its size."""
    found, expected = found.cpu().double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max()) if len(found) else 0.0


def distances(captured: Captured, shown: list[Inside], rows, wish: Wish) -> dict[str, float]:
    """The largest distance by what it is of: relative for rows of tensors, absolute for maps (a key's, all heads) and figures."""
    worst: dict[str, float] = {}

    def note(name, distance):
        worst[name] = max(worst.get(name, 0.0), float(distance))

    assert (tuple(captured.states), tuple(captured.attention), tuple(captured.ffn)) == (
        wish.states,
        wish.attention,
        wish.ffn,
    )
    np.testing.assert_array_equal(np.diff(captured.cu_tokens_B1), [len(one.final) for one in shown])
    np.testing.assert_array_equal(captured.position_R, np.concatenate(rows))
    np.testing.assert_array_equal(captured.sequence_R, np.repeat(np.arange(len(rows)), [len(row) for row in rows]))
    bounds_R = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).tolist()
    for b, one in enumerate(shown):
        own, tokens = slice(*bounds_R[b : b + 2]), slice(*captured.cu_tokens_B1[b : b + 2].tolist())
        at = torch.from_numpy(np.asarray(rows[b]))
        if not len(at):
            continue
        for block in wish.states:
            note("states", relative(captured.states[block][own], one.states[block][at]))
        for block in wish.attention:
            inputs = captured.attention[block]
            found = map_of(inputs, own, tokens, rows[b])
            note("maps", (found - one.maps[block - 1][:, at].double()).abs().max())
            note("keys", relative(inputs.plain_key_TGd[tokens], one.keys[block - 1]))
            note("values", relative(inputs.value_TGd[tokens], one.values[block - 1]))
        for block in wish.ffn:
            found, u = captured.ffn[block], one.ffn[block - 1][at]
            note("energy", (found.energy_R[own].cpu().double() - energy(u)).abs().max())
            if wish.quantiles:
                note("quantiles", (found.quantiles_RQ[own].cpu().double() - quantiles(u)).abs().max())
            else:
                assert found.quantiles_RQ is None
    return worst
