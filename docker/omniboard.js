// Omniboard's configuration: the database of the SACRED_ variables (see .env.template). All users of the machine can read
// command lines, so the password is not on one.
const {SACRED_HOST: host, SACRED_USER: user, SACRED_PASSWORD: password, SACRED_DATABASE, DASHBOARD_HOST} = process.env;

const [, scheme, login, servers, path, options] = host.match(/^(mongodb[^:]*:\/\/)?(.*@)?([^/?]*)\/?([^?]*)\??(.*)$/);
const credentials = login || (user ? `${encodeURIComponent(user)}:${encodeURIComponent(password || "")}@` : "");
const query = new URLSearchParams({authSource: path || "admin"});
new URLSearchParams(options).forEach((value, name) => query.set(name, value));
const uri = `${scheme || "mongodb://"}${credentials}${servers}/${SACRED_DATABASE || "sacred"}?${query}`;

// Omniboard listens on all addresses and has no option for it: here it listens on this machine only.
const {Server} = require("net");
const {listen} = Server.prototype;
Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, port, DASHBOARD_HOST || "127.0.0.1", ...rest);
};

module.exports = {default: {mongodbURI: uri, path: "/sacred"}};
