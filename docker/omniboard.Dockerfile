# The dashboard of docker-compose.yaml: Omniboard from npm, in the tested version.
FROM node:20.19.5-bookworm-slim
RUN npm install --global omniboard@2.16.1
USER 1000:1000
ENTRYPOINT ["omniboard"]
