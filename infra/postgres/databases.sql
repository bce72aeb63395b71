-- The first start makes a database for each server beside the ledger's.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
