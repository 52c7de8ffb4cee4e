"""The methods: one module each, with the experiment that its command runs.

| module                 | source                                     | functions                                  |
|------------------------|--------------------------------------------|--------------------------------------------|
| `overview`             | -                                          | `tokens`, `sites`, `graph`                 |
| `demo`                 | Hendel et al. 2023                         | `demo`                                     |
| `logit_lens`           | nostalgebraist 2020                        | `logit_lens`                               |
| `explore`              | see the module                             | `explore`                                  |
| `attention`            | Vaswani et al. 2017; Kobayashi et al. 2020 | `attention`                                |
| `heads`                | Elhage et al. 2021; Olsson et al. 2022     | `heads`                                    |
| `patching`             | Meng et al. 2022; Wang et al. 2022         | `patches`                                  |
| `sweep`                | Meng et al. 2022; Wang et al. 2022         | `sweep`, `load`, `merge`, `explain`        |
| `diff`                 | nostalgebraist 2020; llama.cpp's tool      | `diff`, `check_comparable`                 |
| `transfer`             | Turner et al. 2023                         | `vector_on_both`, `sweep_on_other`         |
| `blame`                | Wang et al. 2022; Prakash et al. 2024      | `blame`                                    |
| `why`                  | Geva et al. 2023; Meng et al. 2022         | `why`, `span_effects`                      |
| `ablation`             | Olsson et al. 2022; Wang et al. 2022       | `ablate`, `head_sweep`                     |
| `head_ablation`        | Olsson et al. 2022; Wang et al. 2022       | `head_edits`                               |
| `experts`              | Shazeer et al. 2017; Fedus et al. 2021     | `experts`                                  |
| `expert_ablation`      | Lu et al. 2024; Fayyaz et al. 2025         | `expert_edits`                             |
| `knockout`             | Geva et al. 2023                           | `block_edits`                              |
| `attribution`          | Elhage et al. 2021; Wang et al. 2022       | `attribute`                                |
| `changes`              | -                                          | `Changes`                                  |
| `contrast`             | Marks & Tegmark 2023; Zou et al. 2023      | `learn`, `train`                           |
| `steer`                | see `mia.steering`                         | `steer`, `explain`                         |
| `steering`             | see `mia.steering`                         | `mean_kl`, `choose_coefficient`            |
| `bake`                 | Arditi et al. 2024, section 4              | `bake`                                     |
| `listed_words`         | -                                          | `listed_words`                             |
| `tune`                 | Bradford et al. 2018                       | `tune`                                     |
| `actadd`               | Turner et al. 2023                         | `add`, `compare`                           |
| `caa`                  | Rimsky et al. 2023                         | `learn`                                    |
| `caa_evaluation`       | Rimsky et al. 2023                         | `evaluate`                                 |
| `iti`                  | Li et al. 2023                             | `learn`                                    |
| `iti_evaluation`       | Li et al. 2023                             | `evaluate`                                 |
| `perplexity`           | -                                          | `measure`                                  |
| `perplexity_sweep`     | Turner et al. 2023                         | `sweep`                                    |
| `tasks`                | -                                          | `overview`, `pairs`, `prompt`              |
| `icl`                  | -                                          | `experiment`                               |
| `task_vectors`         | Hendel et al. 2023                         | `train_many`, `evaluate_tasks`, `conflict` |
| `function_vectors`     | Todd et al. 2023                           | `train_many`, `evaluate_tasks`             |
| `function_composition` | Todd et al. 2023, section 3.3              | `compose_tasks`                            |
| `soft_vectors`         | Hojel et al. 2024; Soft Injection 2025     | `train`, `evaluate_task`                   |
| `results`              | -                                          | `results`                                  |
| `replay`               | -                                          | `replay`, `compare`                        |
"""
