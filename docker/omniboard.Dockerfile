# The dashboard of docker-compose.yaml: Omniboard as npm has it, in the version that the tests run.
FROM node:20.19.5-bookworm-slim
RUN npm install --global omniboard@2.16.1
USER 1000:1000
ENTRYPOINT ["omniboard"]
