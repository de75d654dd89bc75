"""Evaluation of a checkpoint: `unidiffuser evaluate CONFIG` measures it and writes tables, curves and pictures.

    config, loading, run, report                  one evaluation, from a YAML file to a page
    sources, sampling, tasks, parts               real pictures, the model's samples, and what is kept of them on disk
    extractors, features, inception, clip_score   feature extractors
    classifier                                    interface of an optional classifier of pictures
    frechet, caption_metrics, retrieval, neighbours, metrics, measures   the figures

Nothing is imported here, so that importing one metric loads no model code.
"""
