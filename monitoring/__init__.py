"""Watching production: does what the champion sees still look like what it was judged on?

| module      | takes                        | gives                                                    |
|-------------|------------------------------|----------------------------------------------------------|
| reference   | release                      | Sample: the serving engine's answers on held-out images  |
| window      | rows of the prediction log   | Sample and WindowFacts: what was looked at, what was not |
| drift       | reference x window           | DriftVerdict: pass, drift, inconclusive or no data       |
| labelling   | window                       | the images whose labels would teach most                 |
| outbox      | DriftVerdict                 | a durable alarm, once per model, window and detector     |
| governor    | alarm or schedule            | granted, queued or refused, each with its reason         |
| labels      | a person's file              | who said what an image shows, and when                   |

The only Evidently code is `evidently_report`. Nothing here knows Prefect, MLflow or torch, or reaches into serving.
"""
