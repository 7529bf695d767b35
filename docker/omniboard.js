// Omniboard's configuration: the database that the SACRED_ variables name (.env.template explains them). So no password
// stands on a command line, where all users of the machine could read it.
const {SACRED_HOST: host, SACRED_USER: user, SACRED_PASSWORD: password, SACRED_DATABASE, DASHBOARD_HOST} = process.env;

const [, scheme, login, servers, path, options] = host.match(/^(mongodb[^:]*:\/\/)?(.*@)?([^/?]*)\/?([^?]*)\??(.*)$/);
const credentials = login || (user ? `${encodeURIComponent(user)}:${encodeURIComponent(password || "")}@` : "");
const query = new URLSearchParams({authSource: path || "admin"});
new URLSearchParams(options).forEach((value, name) => query.set(name, value));
const uri = `${scheme || "mongodb://"}${credentials}${servers}/${SACRED_DATABASE || "sacred"}?${query}`;

// It has no option for its address, and listens on all of them: here on that of this machine alone.
const {Server} = require("net");
const {listen} = Server.prototype;
Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, port, DASHBOARD_HOST || "127.0.0.1", ...rest);
};

module.exports = {default: {mongodbURI: uri, path: "/sacred"}};
