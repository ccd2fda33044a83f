"""Trainings by Lightning that write nothing but what a callback writes."""


def quiet_trainer(folder, **settings):
    import lightning  # which may be missing where tests are collected

    return lightning.Trainer(
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
