"""What is read from the text of compiled programs, on golden pieces of it."""

from dreambooth_jax.devices import hlo


def test_collectives_are_read_from_the_compiled_text():
    text = """
    %all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
      %whole = f32[8,16]{1,0} all-reduce(f32[8,16]{1,0} %p), replica_groups={{0,1,2,3}}, to_apply=%add
      ROOT %mine = f32[2,16]{1,0} dynamic-slice(%whole, %i, %j), dynamic_slice_sizes={2,16}
    }

    ENTRY %main (p: f32[2,16]) -> f32[8] {
      %ag = f32[8,16]{1,0} all-gather(f32[2,16]{1,0} %p), replica_groups=[2,4]<=[8], dimensions={0}
      %rs = f32[2,16]{1,0} reduce-scatter(f32[8,16]{1,0} %p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
      %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(bf16[4,8]{1,0} %q), dimensions={0}
      %d = bf16[16,8]{1,0} all-gather-done((bf16[4,8]{1,0}, bf16[16,8]{1,0}) %s)
      %ar = (f32[3]{0}, /*index=1*/f32[5]{0}) all-reduce(f32[3]{0} %a, f32[5]{0} %b), to_apply=%add
      %cp = f32[16]{0} collective-permute(f32[16]{0} %c), source_target_pairs={{0,1},{1,0}}
      %aa = f32[16]{0} all-to-all(f32[16]{0} %c), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
      %ab = f32[16]{0} all-to-all(f32[16]{0} %c), replica_groups=mesh['a'=8] {'a':(1)2}, dimensions={0}
      %ac = f32[16]{0} all-to-all(f32[16]{0} %c), replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}
      ROOT %fusion = f32[8]{0} fusion(%ar), calls=%all-reduce.clone
    }
    """
    assert hlo.collectives(text) == {
        "all-gather": (2, 3 * 2 * 16 * 4 + 16 * 8 * 2),
        "reduce-scatter": (2, 2 * 3 * 2 * 16 * 4),
        "all-reduce": (1, 2 * (3 + 5) * 4),
        "collective-permute": (1, 16 * 4),
        "all-to-all": (3, 3 * 16 + 2 * 16 + 3 * 16),
    }


def test_a_collective_that_runs_beside_several_fusions_counts_once():
    gather = "all-gather(f32[2,16]{1,0} %p), channel_id=15, replica_groups=[2,4]<=[8], dimensions={0}"
    text = f"""
    %async_collective_start {{
      %ag.1 = f32[8,16]{{1,0}} {gather}
    }}
    %beside {{
      %ag.2 = f32[8,16]{{1,0}} {gather}
    }}
    ENTRY %main {{
      %ag.3 = f32[8,16]{{1,0}} {gather.replace("=15", "=16")}
    }}
    """
    assert hlo.collectives(text) == {"all-gather": (2, 2 * 3 * 2 * 16 * 4)}


def test_attention_kernels_are_counted():
    """Two products forward, five backward, of 2 b h q k d FLOPs each, on padded heads."""
    q, k = "bf16[2,8,1024,128]{3,2,1,0}", "bf16[2,8,256,128]{3,2,1,0}"
    layouts = f"operand_layout_constraints={{{q}, {k}, {k}}}"
    text = f"""
      %splash_mha_fwd_residuals.3 = (bf16[2,8,1024,128]{{3,2,1,0}}) custom-call(%q, %k, %v), {layouts}
      %splash_mha_dkv_no_residuals.1 = (bf16[2,8,1024,128]{{3,2,1,0}}) custom-call(%q, %k, %v), {layouts}
      %dot.1 = bf16[2,8,1024,256]{{3,2,1,0}} dot(%q, %k)
    """
    assert hlo.attention_flops(text) == (2 + 5) * 2 * 2 * 8 * 1024 * 256 * 128
    many = text.replace("[2,8,", "[3,2,8,")  # of three subjects
    assert hlo.attention_flops(many) == 3 * hlo.attention_flops(text)
    assert hlo.attention_flops("%dot.1 = f32[8,8]{1,0} dot(%q, %k)") == 0


def test_cycles_are_summed():
    text = """
      %fusion.1 = bf16[8]{0} fusion(%a), backend_config={"window_config":{},"estimated_cycles":"1200"}
      %fusion.2 = bf16[8]{0} fusion(%b), backend_config={"estimated_cycles":"34"}
    """
    assert hlo.cycles(text) == 1234
