"""The yardstick: measures with an extractor of the user's choice, a judge that saw real pictures only, and a resumable run.

``unidiffuser evaluate CONFIG`` measures a model; ``python -m unidiffuser.emoji.judge --data FOLDER --out FILE``
trains the judge again. Nothing is imported here, so that reading the metrics costs no model code.

    sources, sampling, eyes, tasks, parts    what is asked, who looks at the answers, what is kept of them on disk
    features, inception, clip_score, judge   those who look
    frechet, captions_metrics, retrieval, neighbours, metrics, scores    the numbers
    config, subject, run, report, commands   one run from a YAML file to a page
"""
