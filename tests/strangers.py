"""Tiny random models that the decoder does not support. Layers are cut from their files by name, and in PyTorch."""

import pathlib

from tiny import config_of
import torch
import transformers

from elder_jax.hf import safetensors_files
from elder_jax.run import series

V = 96
SIZES = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=48,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=128,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
VISION = dict(
  hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=8
)


def mixtral():
  sizes = SIZES | dict(num_hidden_layers=5, num_local_experts=4, num_experts_per_tok=2)
  return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def deepseek_v3():
  latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
  experts = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=3,
  )
  sizes = {k: v for k, v in SIZES.items() if k != 'head_dim'} | dict(num_hidden_layers=6, num_key_value_heads=4)
  return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes | latent | experts))


def qwen3_next():
  linear = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_hidden_layers=8,
  )
  experts = EXPERTS | dict(shared_expert_intermediate_size=16, decoder_sparse_step=2, mlp_only_layers=[3])
  return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SIZES | linear | experts))


def llama4():
  sizes = SIZES | dict(num_hidden_layers=8, intermediate_size_mlp=48, num_local_experts=4, interleave_moe_layer_step=2)
  text = sizes | dict(attention_chunk_size=16, num_experts_per_tok=1, no_rope_layers=[])
  return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text))


def gemma3():
  text = SIZES | dict(num_hidden_layers=7, sliding_window=8, sliding_window_pattern=3, query_pre_attn_scalar=8)
  config = transformers.Gemma3Config(
    text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90
  )
  return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl():
  vision = dict(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    fullatt_block_indexes=[1],
    window_size=16,
  )
  rope = dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=10000.0)
  sizes = {k: v for k, v in SIZES.items() if k != 'head_dim'}
  text = sizes | dict(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
  config = transformers.Qwen2_5_VLConfig(
    text_config=text | dict(rope_parameters=rope), vision_config=vision, image_token_id=90, video_token_id=91
  )
  return transformers.Qwen2_5_VLForConditionalGeneration(config)


def lfm2():
  sizes = SIZES | dict(num_hidden_layers=6, full_attn_idxs=[2, 4], block_multiple_of=8)
  return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes))


def falcon_h1():
  mamba = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
  return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**SIZES | mamba | dict(num_hidden_layers=5)))


def nemotron_h():
  mamba = dict(mamba_num_heads=4, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)
  sizes = {k: v for k, v in SIZES.items() if k != 'num_hidden_layers'} | dict(hybrid_override_pattern='M-M*-M*-')
  return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**sizes | mamba))


def gpt_oss(**more):
  sizes = SIZES | dict(num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=8) | more
  return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def save(make, folder: pathlib.Path) -> pathlib.Path:
  torch.manual_seed(0)
  with torch.device('cpu'):
    model = make()
  for name, parameter in model.named_parameters():
    if 'norm' not in name.lower():
      torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(folder, max_shard_size='40KB')
  return folder


def cut(folder: pathlib.Path, work: pathlib.Path, removed: list[int], **more) -> pathlib.Path:
  settings = dict(model=str(folder), workdir=str(work), remove_layers=removed, recipe='none', compare=())
  report = series.run(config_of(**settings | more))
  assert report['removed'] == removed
  return work / 'export'


def load(make, folder: pathlib.Path):
  return type(make()).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
  tokens = torch.randint(3, 80, (2, 24), generator=torch.Generator().manual_seed(0))
  with torch.no_grad():
    return model(input_ids=tokens, use_cache=False).logits


def without(model, at: str, removed: list[int]):
  """Deletes layers from a PyTorch model, and their entries from the lists of its config that the forward pass reads."""
  owner, _, name = at.rpartition('.')
  parent = model.get_submodule(owner)
  kept = [l for l in range(len(getattr(parent, name))) if l not in removed]
  setattr(parent, name, torch.nn.ModuleList(getattr(parent, name)[l] for l in kept))
  config = parent.config
  for key in ('layer_types', 'layers_block_type', 'no_rope_layers'):
    if isinstance(value := vars(config).get(key), list):
      setattr(config, key, [value[l] for l in kept])
  if 'num_hidden_layers' in vars(config):
    config.num_hidden_layers = len(kept)
  return model


def tensor_bytes(folder: pathlib.Path) -> dict[str, tuple]:
  found = {}
  for path in folder.glob('*.safetensors'):
    begin, header = safetensors_files._data_begins(path)
    for name, about in header.items():
      first, end = about['data_offsets']
      found[name] = about['dtype'], about['shape'], path.read_bytes()[begin + first : begin + end]
  return found
