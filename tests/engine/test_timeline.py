"""Where a step's time went: timelines made by hand, and names that kernels really have."""

from __future__ import annotations

import pytest

from tanren.engine.timeline import (
    CATEGORIES,
    Kernel,
    Step,
    category_of,
    most_expensive,
    split,
    union,
)

GEMM, NORM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "rmsnorm_fwd_tuned_kernel"
NCCL = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
NAMES = [
    (GEMM, "gemm"),
    ("nvjet_sm90_tss_256x128_64x4_2x1_v_bz_coopA_NTT", "gemm"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "gemm"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "gemm"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
    ("nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "gemm_fp8"),
    ("nvjet_sm90_rqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "gemm_fp8"),
    ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128", "gemm_fp8"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
    ("void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<...>", "norm"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
    ("void transformer_engine::(anonymous namespace)::cast_transpose_fused_kernel<>", "fp8_cast"),
    ("void transformer_engine::transpose_optimized_kernel<__nv_fp8_e4m3>", "fp8_cast"),
    ("void transformer_engine::delayed_scaling_recipe::amax_and_scale_update", "fp8_cast"),
    ("void multi_tensor_apply_for::multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer"),
    (NCCL, "communication_exposed"),
    ("ncclDevKernel_AllGather_RING_LL", "communication_exposed"),
    ("online_softmax_kernel", "head"),
    ("cross_entropy_kernel", "head"),
    ("element_mul_kernel", "head"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
     "elementwise"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "elementwise"),
    ("void transformer_engine::gated_act_kernel<swiglu>", "elementwise"),
    ("triton_poi_fused_mul_silu_0", "elementwise"),
    ("nvfuser_pointwise_f0_c1_r0_g0", "elementwise"),
    ("void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "elementwise"),
    ("Memcpy HtoD (Pinned -> Device)", "elementwise"),
    ("some_kernel_of_tomorrow", "other"),
    ("aten::mm", "gemm"),
    ("aten::transpose", "elementwise"),
    ("gloo:all_reduce", "communication_exposed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "category"), NAMES)
def test_a_kernel_has_the_category_of_its_name(name: str, category: str) -> None:
    assert category_of(name) == category


def kernel(name: str, start: int, end: int, launched: int | None = None) -> Kernel:
    return Kernel(name, start, end, start if launched is None else launched)


def spent(step: Step) -> dict[str, int]:
    found = split(step)
    assert tuple(found.nanoseconds) == CATEGORIES
    assert found.step == step.window[1] - step.window[0]
    return {category: time for category, time in found.nanoseconds.items() if time}


def test_a_union_has_no_time_twice() -> None:
    assert union([(5, 9), (0, 2), (1, 3), (7, 8), (3, 4), (12, 12)]) == [(0, 4), (5, 9)]


def test_communication_is_exposed_where_nothing_computes() -> None:
    step = Step((0, 100), [
        kernel(GEMM, 10, 30), kernel(NCCL, 20, 60), kernel(NORM, 40, 50), kernel(NCCL, 55, 70),
    ])  # fmt: skip
    assert spent(step) == {"gemm": 20, "norm": 10, "communication_exposed": 30, "idle": 40}
    assert split(step).overlapped == 20
    assert split(step).share("communication_exposed") == 0.3


def test_of_two_kernels_at_once_one_has_the_time() -> None:
    step = Step((0, 50), [kernel(NORM, 0, 30), kernel(GEMM, 20, 40), kernel(GEMM, 25, 35)])
    assert spent(step) == {"norm": 20, "gemm": 20, "idle": 10}


def test_what_is_outside_of_the_step_does_not_count() -> None:
    step = Step((100, 200), [kernel(GEMM, 50, 120), kernel(GEMM, 190, 260), kernel(NORM, 0, 100)])
    assert spent(step) == {"gemm": 30, "idle": 70}


def test_idle_time_is_a_wait_for_data_where_the_host_waits() -> None:
    step = Step((0, 100), [kernel(GEMM, 20, 50)], waits=[(0, 30), (90, 95)])
    assert spent(step) == {"gemm": 30, "data_wait": 25, "idle": 45}


def test_a_range_of_the_host_says_what_its_kernels_are_but_not_its_communication() -> None:
    step = Step(
        (0, 100),
        [kernel(GEMM, 50, 60, launched=10), kernel(GEMM, 60, 70, launched=20),
         kernel(NCCL, 70, 80, launched=15), kernel("scale", 80, 90, launched=31)],
        ranges={"head": [(5, 20)], "optimizer": [(30, 40)]},
    )  # fmt: skip
    assert spent(step) == {
        "head": 10, "gemm": 10, "communication_exposed": 10, "optimizer": 10, "idle": 60,
    }  # fmt: skip


def test_the_most_expensive_names_come_first() -> None:
    step = Step((0, 100), [kernel(NORM, 0, 5), kernel(GEMM, 5, 9), kernel(NORM, 9, 12)])
    found = [(cost.name, cost.category, cost.calls, cost.nanoseconds)
             for cost in most_expensive(step, 25)]  # fmt: skip
    assert found == [(NORM, "norm", 2, 8), (GEMM, "gemm", 1, 4)]
    assert len(most_expensive(step, 1)) == 1
