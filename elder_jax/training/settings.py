"""The settings of all training but the gates'."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
  """How a model is trained; `seed` draws LoRA's first factors."""

  penalty: str = setting('l2', "Norm of a layer's update in the penalty.", choices=('l2', 'l1'), rare=True)
  penalty_scale: str = setting(
    'token',
    "token: mean over tokens of each token's norm; relative: the same, divided by the norm of the layer's input; "
    'none: norm over the whole batch.',
    choices=('token', 'relative', 'none'),
    rare=True,
  )
  lambda2: float = setting(1e-3, 'Weight of the penalty on the updates of the layers that will be removed.', least=0)
  lambda2_power: float = setting(
    0.0,
    'Ramp of lambda2: it is lambda2 * f^power at the fraction f of the steps; 0: constant, 1: linear, 2: square.',
    least=0,
    rare=True,
  )
  order: str = setting(
    'sequential',
    'joint: all chosen layers are penalised together; sequential: one after another, each switched off after its turn.',
    choices=('joint', 'sequential'),
  )
  anneal: float = setting(
    0.0,
    'Fraction of the steps of regularize in which the gates of the chosen layers go from 1 to 0; 0: they stay at 1.',
    least=0,
    most=1,
    rare=True,
  )
  distill: tuple[float, ...] = setting(
    (0.0,),
    "Weight of the KL divergence from the dense model's predictions, in all training; 1 minus it is the LM loss's. "
    'START:END, as in 0.9:0.5: it goes from the one to the other over the steps, along a cosine.',
    least=0,
    most=1,
    colon=True,
  )
  temperature: float = setting(
    1.0,
    'Temperature of both distributions in the KL divergence of --distill, which is multiplied by its square.',
    above=0,
    rare=True,
  )
  distill_hidden: float = setting(
    0.0,
    "Weight of the squared relative error of each layer's output against the dense model's at the same place, averaged "
    'over layers and tokens. It is added to the loss; 0: none.',
    least=0,
    rare=True,
  )
  steps: int | None = setting(
    None,
    'Steps of stage 2, and of the training of other recipes; unset: one pass over the sequences.',
    flag='train_steps',
    least=0,
  )
  lr: float = setting(
    3e-4,
    'Peak learning rate. LoRA needs a higher one, lion one 3 to 10 times lower.',
    least=0,
  )
  lr_schedule: str = setting(
    'linear',
    'What the learning rate does after its rise: linear and cosine fall from the peak to the last step; wsd stays at '
    'the peak and falls linearly over the last --decay_ratio of the steps.',
    choices=('linear', 'cosine', 'wsd'),
  )
  lr_final: float = setting(
    0.0, 'Learning rate that the schedule ends at, as a fraction of the peak.', least=0, most=1, rare=True
  )
  decay_ratio: float = setting(
    0.2,
    'Fraction of the steps over which --lr_schedule=wsd falls, at their end.',
    least=0,
    most=1,
    rare=True,
  )
  warmup_ratio: float = setting(
    0.05,
    'Fraction of the steps over which the learning rate rises from 0.',
    least=0,
    below=1,
    rare=True,
  )
  weight_decay: float = setting(0.0, 'Weight decay of matrices.', least=0, rare=True)
  grad_clip: float = setting(1.0, 'Norm that gradients are clipped to.', above=0, rare=True)
  grad_accum: int = setting(1, 'Parts that a batch is processed in, to save memory; must divide --batch_size.', least=1)
  trainable: str = setting(
    'blocks',
    "blocks: the layers' weights; all: embedding, final norm and head as well.",
    choices=('blocks', 'all'),
  )
  optimizer: str = setting(
    'adamw',
    'Optimiser of the training; stage 1 always has Adam. Its float32 state per trained weight: adamw 8 bytes; lion 4; '
    'adafactor (factored, no momentum) next to none for matrices with two axes of 128 or more.',
    choices=('adamw', 'adafactor', 'lion'),
    rare=True,
  )
  moment_dtype: str = setting(
    'float32',
    "Type of the first moment of --optimizer=adamw and of lion's only one, 2 bytes per trained weight less in bfloat16; "
    'second moments stay float32. Stage 1 stays float32.',
    choices=('float32', 'bfloat16'),
    rare=True,
  )
  lora_rank: int = setting(
    0,
    "Rank of LoRA in all training but stage 1: only a low-rank change of each of the layers' matrices is trained, the "
    'matrices themselves, norms, biases and embeddings are frozen; merged before pruning and export. 0: no LoRA.',
    least=0,
  )
  lora_alpha: float | None = setting(
    None,
    "LoRA's change is alpha / rank times the product of its factors; unset: twice --lora_rank.",
    above=0,
    rare=True,
  )
  validate_every: int = setting(
    0,
    'Steps between measurements of the loss on --validation_sequences sequences that are held out of the training text, '
    'from before the first step to after the last; 0: none.',
    least=0,
  )
  export: str = setting(
    'last',
    'Which state of the training is used: last; best, that of the lowest held-out loss (needs --validate_every).',
    choices=('last', 'best'),
  )
  seed: int = 0
  only: str = ''  # the one parameter of the layers that trains, by name; empty: those of `trainable`

  def __post_init__(self):
    if isinstance(self.distill, int | float) and not isinstance(self.distill, bool):  # the same weight in all steps
      object.__setattr__(self, 'distill', (self.distill,))
    super().__post_init__()
    if len(self.distill) not in (1, 2):
      raise InputError(
        'distill', self.distill, 'must be one weight, or two: that of the start and that of the end, as in 0.9:0.5.'
      )
    if self.optimizer == 'adafactor' and self.moment_dtype != 'float32':
      raise InputError(
        'moment_dtype',
        self.moment_dtype,
        '--optimizer=adafactor has no first moment; leave out the type, or use adamw or lion.',
      )
    if self.export == 'best' and not self.validate_every:
      raise InputError('export', 'best', 'needs held-out losses to choose by; give --validate_every as well.')
    if self.lora_rank and self.trainable == 'all':
      raise InputError(
        'lora_rank',
        self.lora_rank,
        "LoRA trains nothing but a change of the layers' matrices; use --trainable=blocks.",
      )
    if self.lora_alpha is not None and not self.lora_rank:
      raise InputError('lora_alpha', self.lora_alpha, 'needs --lora_rank; give both, or neither.')

  @property
  def trained(self) -> str:
    """What trains, as step.train_mask has it."""
    return self.only or ('lora' if self.lora_rank else self.trainable)

  @property
  def alpha(self) -> float:
    """LoRA's alpha."""
    return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

  @property
  def distils(self) -> bool:
    """The KL divergence from a teacher's predictions is in the loss of some step."""
    return max(self.distill) > 0

  @property
  def taught(self) -> bool:
    """A teacher runs in every step."""
    return self.distils or self.distill_hidden > 0

  @property
  def taught_by(self) -> str:
    """The setting that needs a teacher, for errors; '' where none does."""
    return 'distill' if self.distils else 'distill_hidden' if self.taught else ''

  @property
  def sequential(self) -> bool:
    return self.order == 'sequential'
