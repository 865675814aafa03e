"""Tables of the pipelines and denoisers of diffusers that cannot be gated, by class name, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping

_PLAIN = "What works instead: the pipeline without tgate_compile"


_THREE_WAY = (
    "its guidance makes three predictions, [text; image; uncond], and the gate merges two. "
    f"{_PLAIN}, or with fewer steps"
)


_MORE_CONCEPTS = (
    "its guidance makes one more prediction for each concept that it removes or edits, and the gate merges two. "
    f"{_PLAIN}, or the same checkpoint in its ordinary pipeline (`from_pipe`)"
)


_TWO_IMAGES = (
    "it denoises a source and a target image together, four predictions in a step, and the gate merges two. "
    f"{_PLAIN}, or with fewer steps"
)


_MOMENTUM = (
    "its guidance has momentum, which still acts after guidance has ended, so that the image would follow neither "
    f"half alone. {_PLAIN}, or with fewer steps"
)


_PERTURBED = (
    "perturbed guidance needs a second, differently computed prediction in every step, which the pruned graph does "
    "not make. What works instead: the same checkpoint in its ordinary pipeline (`from_pipe`)"
)


_SEVERAL_CALLS = (
    "it calls its denoiser several times per step for different inputs, so that one cache cannot stand for them. "
    f"{_PLAIN}"
)


_SEVERAL_TIMESTEPS = (
    "each call of its denoiser computes several timesteps, which can lie on both sides of the gate. "
    f"{_PLAIN}, or with fewer steps"
)


_PIECES = (
    "it makes a video in pieces, with a loop over the timesteps for each and earlier pieces as further inputs, so that "
    f"steps cannot be counted and the caches of one piece are wrong for the next. {_PLAIN}, or with fewer steps"
)


_FRAMES_CHANGE = (
    "it can drop frames in the middle of a call (`enable_temporal_reasoning`), and the caches then no longer fit. "
    f"{_PLAIN}, or with fewer steps"
)


_ATTENTION_MAPS = (
    f"it reads or changes the attention maps while it runs, and a compiled graph does not expose them. {_PLAIN}"
)


_SWITCHES_LAYERS = (
    "it switches the grounding layers of its denoiser off in the middle of a call, and a captured graph has them "
    f"either on or off. {_PLAIN}"
)


_CROSS_FRAME = (
    "it replaces the attention processors so that all frames attend to the first one, and runs parts of the "
    f"timesteps for one frame and for all frames in turn. {_PLAIN}"
)


_ADDED_KEYS = (
    "its attentions append the keys of the prompt to those of the latents, so it has no cross-attention to "
    f"cache. {_PLAIN}, or with fewer steps"
)


_SOUND_AND_VIDEO = (
    "its denoiser makes sound and video together, which attend to each other, and caching the attention to the "
    "text has not been verified for that. What works instead: guidance that ends early, with AdaptiveGuidance"
)


_SECOND_NETWORK = (
    "its guidance compares the predictions of two networks, `transformer` and `unconditional_transformer`, and a graph "
    f"of one of them cannot leave out the other. {_PLAIN}, or with fewer steps"
)


_OTHER_MODES = (
    "depending on its mode it makes one to three denoiser calls in a step, with the text or the image replaced by "
    f"noise, so it is not known which call is a guidance half. {_PLAIN}, or with fewer steps"
)


_TEXT_IN_CHANNELS = (
    "its denoiser reads the text from additional channels of the latents, so it has no cross-attention to cache. "
    f"{_PLAIN}, or with fewer steps"
)


_RECURRENT = (
    "its denoiser computes attention as a recurrence over the frames, and gating has not been verified for that. "
    f"{_PLAIN}, or with fewer steps"
)


_TOKENS = (
    f"it predicts discrete tokens instead of noise, and only denoising can be gated. {_PLAIN}, or with fewer steps"
)


_TWO_DENOISERS = (
    "its denoiser is not the component `unet` or `transformer`, but is assembled from the blocks of two UNets. "
    f"{_PLAIN}"
)


_ONNX = (
    "its models are ONNX graphs already, and only PyTorch modules can be captured. What works instead: the same "
    "checkpoint in its PyTorch pipeline, optimized and exported with tgate_compile.export(pipe, folder, format='onnx')"
)


_REFUSED_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        _THREE_WAY,
        (
            "DreamLitePipeline",
            "LEditsPPPipelineStableDiffusion",
            "LEditsPPPipelineStableDiffusionXL",
            "StableDiffusionInstructPix2PixPipeline",
            "StableDiffusionXLInstructPix2PixPipeline",
        ),
    ),
    (_MORE_CONCEPTS, ("StableDiffusionPipelineSafe",)),
    (_TWO_IMAGES, ("CycleDiffusionPipeline",)),
    (_MOMENTUM, ("AceStepPipeline",)),
    (_SEVERAL_CALLS, ("StableDiffusionDiffEditPipeline", "StableDiffusionPanoramaPipeline")),
    (_SEVERAL_TIMESTEPS, ("StableDiffusionParadigmsPipeline",)),
    (
        _PIECES,
        (
            "AnyFlowFARPipeline",
            "Cosmos2_5_TransferPipeline",
            "HeliosPipeline",
            "HeliosPyramidPipeline",
            "HunyuanVideoFramepackPipeline",
            "LTXI2VLongMultiPromptPipeline",
            "SanaWMLTX2Refiner",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "WanAnimatePipeline",
        ),
    ),
    (_FRAMES_CHANGE, ("ChronoEditPipeline",)),
    (
        _ATTENTION_MAPS,
        (
            "StableDiffusionAttendAndExcitePipeline",
            "StableDiffusionPix2PixZeroPipeline",
            "StableDiffusionSAGPipeline",
        ),
    ),
    (_SWITCHES_LAYERS, ("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline")),
    (_CROSS_FRAME, ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline")),
    (
        _ADDED_KEYS,
        (
            "IFImg2ImgPipeline",
            "IFImg2ImgSuperResolutionPipeline",
            "IFInpaintingPipeline",
            "IFInpaintingSuperResolutionPipeline",
            "IFPipeline",
            "IFSuperResolutionPipeline",
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22ControlnetImg2ImgPipeline",
            "KandinskyV22ControlnetPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22Img2ImgPipeline",
            "KandinskyV22InpaintCombinedPipeline",
            "KandinskyV22InpaintPipeline",
            "KandinskyV22Pipeline",
            "StableCascadeCombinedPipeline",
            "StableCascadeDecoderPipeline",
            "StableCascadePriorPipeline",
            "UnCLIPImageVariationPipeline",
            "UnCLIPPipeline",
            "WuerstchenCombinedPipeline",
            "WuerstchenDecoderPipeline",
            "WuerstchenPriorPipeline",
        ),
    ),
    (_SECOND_NETWORK, ("Ideogram4Pipeline",)),
    (_OTHER_MODES, ("UniDiffuserPipeline",)),
    (_RECURRENT, ("SanaWMPipeline",)),
    (
        _TOKENS,
        ("AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline", "VQDiffusionPipeline"),
    ),
    (
        _TWO_DENOISERS,
        (
            "VersatileDiffusionDualGuidedPipeline",
            "VersatileDiffusionImageVariationPipeline",
            "VersatileDiffusionPipeline",
            "VersatileDiffusionTextToImagePipeline",
        ),
    ),
    (
        _ONNX,
        (
            "OnnxStableDiffusionImg2ImgPipeline",
            "OnnxStableDiffusionInpaintPipeline",
            "OnnxStableDiffusionInpaintPipelineLegacy",
            "OnnxStableDiffusionPipeline",
            "OnnxStableDiffusionUpscalePipeline",
            "StableDiffusionOnnxPipeline",
        ),
    ),
)


#: Pipeline classes of diffusers that cannot be gated, with the reason.
REFUSED: Mapping[str, str] = {name: reason for reason, names in _REFUSED_GROUPS for name in names}


#: Base classes of pipelines that cannot be gated, with the reason.
REFUSED_BASES: Mapping[str, str] = {"PAGMixin": _PERTURBED}


#: Denoiser classes with joint attention: text and image tokens form one sequence. They have no cross-attention.
JOINT_ATTENTION = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "ConsisIDTransformer3DModel",
        "Cosmos3OmniTransformer",
        "EasyAnimateTransformer3DModel",
        "ErnieImageTransformer2DModel",
        "Flux2Transformer2DModel",
        "Flux3Transformer2DModel",
        "FluxTransformer2DModel",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "Ideogram4Transformer2DModel",
        "JoyImageEditPlusTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Krea2Transformer2DModel",
        "LongCatImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "MiniMaxH3Transformer3DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "OmniGenTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "UniDiffuserModel",
        "ZImageTransformer2DModel",
    }
)


#: Denoiser classes that cannot be gated in any pipeline, with the reason.
REFUSED_DENOISERS: Mapping[str, str] = {
    "AnyFlowFARTransformer3DModel": _PIECES,
    "HeliosTransformer3DModel": _PIECES,
    "MiniMaxMusic3Transformer1DModel": _TEXT_IN_CHANNELS,
    "SanaWMLTX2RefinerTransformer3DModel": _PIECES,
    "WanAnimate2Transformer3DModel": _PIECES,
    "WanAnimateTransformer3DModel": _PIECES,
}


#: Denoiser classes whose cross-attentions cannot be cached, with the reason. Guidance can be dropped.
UNCACHED_DENOISERS: Mapping[str, str] = {
    "Kandinsky6Transformer3DModel": _SOUND_AND_VIDEO,
    "LTX2VideoTransformer3DModel": _SOUND_AND_VIDEO,
}


_NO_TEXT = "no text to attend to: unconditional, or conditioned on a class, an image or a structure"


_POOLED_TEXT = "no cross-attention: the text is one vector, added to the time embedding"


_PRIOR = "makes an embedding for another pipeline, or a three-dimensional shape"


_ONE_PASS = "decodes, enlarges or converts what another pipeline has made"


_LANGUAGE = "a language model, which fills in masked tokens"


_NOT_DENOISING_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        _NO_TEXT,
        (
            "AudioDiffusionPipeline",
            "ConsistencyModelPipeline",
            "DDIMPipeline",
            "DDPMPipeline",
            "DanceDiffusionPipeline",
            "DiTPipeline",
            "Kandinsky6SRPipeline",
            "KarrasVePipeline",
            "LDMPipeline",
            "LDMSuperResolutionPipeline",
            "PNDMPipeline",
            "RFD4ProteinaPipeline",
            "RePaintPipeline",
            "ScoreSdeVePipeline",
        ),
    ),
    (_POOLED_TEXT, ("AudioLDMPipeline", "MusicLDMPipeline")),
    (
        _PRIOR,
        (
            "FluxPriorReduxPipeline",
            "KandinskyPriorPipeline",
            "KandinskyV22PriorEmb2EmbPipeline",
            "KandinskyV22PriorPipeline",
            "ShapEImg2ImgPipeline",
            "ShapEPipeline",
        ),
    ),
    (
        _ONE_PASS,
        (
            "LTX2LatentUpsamplePipeline",
            "LTX2VideoDiffusionDecodePipeline",
            "LTXLatentUpsamplePipeline",
            "SpectrogramDiffusionPipeline",
        ),
    ),
    (_LANGUAGE, ("DiffusionGemmaPipeline", "LLaDA2Pipeline")),
)


#: Pipeline classes of diffusers that do not denoise latents conditioned on text, each with a description.
NOT_DENOISING: Mapping[str, str] = {name: reason for reason, names in _NOT_DENOISING_GROUPS for name in names}


#: Modular pipelines whose denoiser can be gated, with the pipeline class that uses the same denoiser.
MODULAR: Mapping[str, str] = {
    "AnimaModularPipeline": "Cosmos2TextToImagePipeline",
    "LTXModularPipeline": "LTXPipeline",
    "StableDiffusionXLModularPipeline": "StableDiffusionXLPipeline",
    "Wan22Image2VideoModularPipeline": "WanImageToVideoPipeline",
    "Wan22ModularPipeline": "WanPipeline",
    "Wan22VaceModularPipeline": "WanVACEPipeline",
    "WanImage2VideoModularPipeline": "WanImageToVideoPipeline",
    "WanModularPipeline": "WanPipeline",
}


#: Modular pipelines that cannot be gated, with the class of the denoiser that is the reason.
MODULAR_REFUSED: Mapping[str, str] = {
    "Cosmos3DistilledModularPipeline": "Cosmos3OmniTransformer",
    "Cosmos3OmniModularPipeline": "Cosmos3OmniTransformer",
    "EchoModularPipeline": "LTX2VideoTransformer3DModel",
    "ErnieImageModularPipeline": "ErnieImageTransformer2DModel",
    "Flux2KleinBaseModularPipeline": "Flux2Transformer2DModel",
    "Flux2KleinModularPipeline": "Flux2Transformer2DModel",
    "Flux2ModularPipeline": "Flux2Transformer2DModel",
    "Flux3DistilledModularPipeline": "Flux3Transformer2DModel",
    "Flux3ModularPipeline": "Flux3Transformer2DModel",
    "FluxKontextModularPipeline": "FluxTransformer2DModel",
    "FluxModularPipeline": "FluxTransformer2DModel",
    "HeliosModularPipeline": "HeliosTransformer3DModel",
    "HeliosPyramidDistilledModularPipeline": "HeliosTransformer3DModel",
    "HeliosPyramidModularPipeline": "HeliosTransformer3DModel",
    "HunyuanVideo15ModularPipeline": "HunyuanVideo15Transformer3DModel",
    "Ideogram4ModularPipeline": "Ideogram4Transformer2DModel",
    "Krea2ModularPipeline": "Krea2Transformer2DModel",
    "Krea2TurboModularPipeline": "Krea2Transformer2DModel",
    "LTX25ModularPipeline": "LTX2VideoTransformer3DModel",
    "LTX2ModularPipeline": "LTX2VideoTransformer3DModel",
    "MiniMaxH3ModularPipeline": "MiniMaxH3Transformer3DModel",
    "MiniMaxMusic3ModularPipeline": "MiniMaxMusic3Transformer1DModel",
    "QwenImage21ModularPipeline": "QwenImage21Transformer2DModel",
    "QwenImage21TurboModularPipeline": "QwenImage21Transformer2DModel",
    "QwenImageEditModularPipeline": "QwenImageTransformer2DModel",
    "QwenImageEditPlusModularPipeline": "QwenImageTransformer2DModel",
    "QwenImageLayeredModularPipeline": "QwenImageTransformer2DModel",
    "QwenImageModularPipeline": "QwenImageTransformer2DModel",
    "StableDiffusion3ModularPipeline": "SD3Transformer2DModel",
    "WanAnimate2DistilledModularPipeline": "WanAnimate2Transformer3DModel",
    "WanAnimate2ModularPipeline": "WanAnimate2Transformer3DModel",
    "ZImageModularPipeline": "ZImageTransformer2DModel",
}
