"""Names that libraries call private and that are used here: one list, so that an upgrade shows at once what has gone.

Each line: the object that has the name, the name, and what it is wanted for."""

TRAINER, TUNER, LAYER = (
    "transformers:Trainer",
    "peft.tuners.tuners_utils:BaseTuner",
    "peft.tuners.tuners_utils:BaseTunerLayer",
)

BORROWED = [
    (TRAINER, "_maybe_log_save_evaluate", "after each step: tell, obey, save"),
    (TRAINER, "_save_checkpoint", "a checkpoint is whole or not there"),
    (TRAINER, "_save", "only what is trained is saved"),
    (TRAINER, "_load_from_checkpoint", "trained tensors are put back in place"),
    (TRAINER, "_get_output_dir", "checkpoints are prepared beside their place"),
    (TRAINER, "_prepare_inputs", "a batch goes where the model is"),
    (TRAINER, "_clip_grad_norm", "gradients are unscaled before they are clipped"),
    ("transformers.trainer", "_globalstep_last_logged", "whether this step was told already"),
    ("transformers.training_args", "_n_gpu", "one process trains on one GPU"),
    ("trl:DPOTrainer", "_prepare_dataset", "pairs come encoded"),
    ("trl.DPOTrainer.__init__", "_metrics", "TRL's figures of a step"),
    ("trl:DPOTrainer", "_send_telemetry", "nothing leaves the machine"),
    ("transformers.modeling_utils", "_attn_implementation", "attention of packed rows"),
    ("transformers.configuration_utils", "_name_or_path", "what a model from the cache is called"),
    (
        "transformers.core_model_loading",
        "_weight_conversions",
        "weights that are named otherwise in files are not cached",
    ),
    ("transformers:AutoModelForCausalLM", "_model_mapping", "which class a config makes"),
    ("transformers:PreTrainedModel", "_is_stateful", "models that carry a state are refused"),
    (
        "transformers:PreTrainedModel",
        "_supports_attention_backend",
        "models with an attention of their own are refused",
    ),
    (LAYER, "_active_adapter", "other adapters for some forward passes"),
    (LAYER, "_disable_adapters", "no adapter for some forward passes"),
    (LAYER, "_cast_input_dtype", "TinyLoRA layers take inputs as LoRA layers do"),
    (TUNER, "_pre_injection_hook", "TinyLoRA looks at its base first"),
    (TUNER, "_create_and_replace", "TinyLoRA puts its layers in"),
    (TUNER, "_replace_module", "the same"),
    (TUNER, "_check_target_module_exists", "TinyLoRA counts its layers"),
    (TUNER, "_get_adapter_state_dict", "what of TinyLoRA is saved"),
    (TUNER, "_remap_adapter_state_dict_for_load", "PEFT's own TinyLoRA folders are read"),
    ("peft:tuners", "_buffer_dict", "TinyLoRA's buffers by adapter"),
    ("torch.optim.lr_scheduler.LRScheduler._update_lr", "_last_lr", "the learning rate changes in flight"),
    ("torch:Tensor", "_is_view", "a view is not written over"),
    ("torch:ops.mkldnn", "_linear_pointwise", "products in oneDNN's order"),
    ("torch:ops.mkldnn", "_reorder_linear_weight", "a weight in oneDNN's order"),
    ("torch:ops.mkldnn", "_is_mkldnn_bf16_supported", "whether there is such an order"),
    ("torch:cpu", "_is_avx512_bf16_supported", "whether the processor has bf16 instructions"),
    ("torch:ops.aten", "_softmax_backward_data", "the derivative of attention's softmax"),
    ("bitsandbytes:functional", "_convert_weight_packed_for_cpu", "4-bit weights for the kernel of few rows"),
    ("datasets.arrow_dataset", "_fingerprint", "whether a table is still what was read"),
    ("argparse:ArgumentParser().", "_actions", "the flags there are"),
    ("argparse:ArgumentParser().", "_option_string_actions", "the same, by what is written"),
]
